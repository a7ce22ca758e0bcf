"""NGD's state for torch.distributed.checkpoint: each rank writes and reads its own part, and nothing is gathered.

That library loads in place into the result of `state_dict`, so the structure here depends on the model, the config and
the ranks alone: a missing tensor is zeros, and plain values beside it say so. Values that are not tensors sit in
tuples, which the library stores whole and reads back as they were.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ngd_dist.checkpoint import LayerFormat, SavedState, check_format
from ngd_dist.errors import ConfigError
from ngd_dist.optimizer import NGD
from ngd_dist.preconditioner import Preconditioner

__all__ = ["ShardedState"]

MOMENTUM = "momentum_buffer"
ADAMW = ("step", "exp_avg", "exp_avg_sq")
State = dict[str, Any]


class ShardedState:
    """NGD's state as torch.distributed.checkpoint takes it, in files that load at any world size.

    >>> import tempfile
    >>> import torch.distributed.checkpoint as dcp
    >>> from ngd_dist import NGD, ShardedState
    >>> model = torch.nn.Linear(8, 4)
    >>> optimizer, folder = NGD(model), tempfile.mkdtemp()
    >>> saved = dcp.save({"model": model.state_dict(), "optimizer": ShardedState(optimizer)}, checkpoint_id=folder)
    >>> dcp.load({"model": model.state_dict(), "optimizer": ShardedState(optimizer)}, checkpoint_id=folder)

    A rank writes the layers that it holds; tensors that are the same on all ranks (momentum, schedule, settings) are
    shared out between them. At load a rank reads its own layers and the tensors that all need. All tensors here are
    copies in host memory, so that training may go on after `dcp.async_save` has returned, and a load that fails leaves
    the optimizer as it was.

    `torch.distributed.checkpoint.state_dict.get_optimizer_state_dict` is no way to save NGD. It keeps momentum and
    param_groups but drops the statistics without a warning; and if there is neither momentum nor a gradient yet, it
    calls `step` with zeros, which counts as a step. `NGD.load_state_dict` refuses the result, and so does
    `set_optimizer_state_dict`.
    """

    def __init__(self, optimizer: NGD | Preconditioner) -> None:
        engine = optimizer._engine
        if engine.is_sharded:
            raise ConfigError(
                f"ShardedState can't hold the pieces of {engine.averager}: save state_dict(), or the state_dict_part() "
                "of each rank"
            )
        self._optimizer = optimizer

    @property
    def _saved(self) -> SavedState:
        return self._optimizer.saved_state

    def state_dict(self) -> State:
        """Returns the state of this rank; not collective."""
        # Torch's method, not NGD's, which gathers.
        torchs = torch.optim.Optimizer.state_dict(self._optimizer)
        local = self._saved.local(self._optimizer.stats)
        layers, fallback = local.pop("layers"), local.pop("fallback")
        momentum = {name: torchs["state"].get(i, {}).get(MOMENTUM) for i, name in enumerate(self._saved.parameters)}
        known = {
            "param_groups": torchs["param_groups"],
            "momentum": tuple(name for name, buffer in momentum.items() if buffer is not None),
            "fallback": None if fallback is None else tuple(fallback),
            "caches": {name: tuple(layer_format.cache) for name, layer_format in self._saved.formats.items()},
        }
        state: State = {
            "everywhere": (local | known,),
            "momentum": {name: _copy(momentum[name], p.shape, p.dtype) for name, p in self._saved.parameters.items()},
            "fallback": self._fallback(fallback or {}),
            **{kind: {} for kind in ("statistics", "before", "caches", "weights", "cached", "remembered")},
        }
        for name, layer_format in self._saved.formats.items():
            _add_layer(state, name, layer_format, layers[name])
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over a `state_dict` into which `dcp.load` has read.

        Raises: CheckpointError, with nothing changed, if it is of another format or other settings. If the checkpoint
        lacks a layer or a shape, dcp itself raises a CheckpointException, which names the missing key.
        """
        (everywhere,) = state_dict["everywhere"]
        check_format(everywhere["format"])
        for name in self._saved.formats:  # of all ranks, so that all ranks raise or none
            self._saved.check_cache(name, everywhere["caches"].get(name, ()))
        ngd = {key: value for key, value in everywhere.items() if key not in ("param_groups", "momentum", "caches")}
        ngd["layers"] = {name: self._layer(name, state_dict) for name in self._saved.formats}
        if everywhere["fallback"] is not None:
            ngd["fallback"] = {name: _of(name, ADAMW, state_dict["fallback"]) for name in everywhere["fallback"]}
        ids = chain.from_iterable(group["params"] for group in everywhere["param_groups"])
        momentum = {
            i: {MOMENTUM: state_dict["momentum"][name]}
            for i, name in zip(ids, self._saved.parameters, strict=False)
            if name in everywhere["momentum"]
        }
        self._optimizer.load_state_dict({"state": momentum, "param_groups": everywhere["param_groups"], "ngd": ngd})

    def _fallback(self, fallback: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name in self._saved.plain:
            p, state = self._saved.parameters[name], fallback.get(name, {})
            tensors[f"{name}.step"] = _copy(state.get("step"), (), torch.float32)
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{name}.{moment}"] = _copy(state.get(moment), p.shape, p.dtype)
        return tensors

    def _layer(self, name: str, state: Mapping[str, Any]) -> State:
        layer_format, is_cached = self._saved.formats[name], state["cached"].get(name, False)
        layer: State = {"cache": _of(name, layer_format.local_cache, state["caches"]) if is_cached else None}
        if not layer_format.inverts:
            return layer
        values, before = (_of(name, layer_format.statistics, state[kind]) for kind in ("statistics", "before"))
        weights = state["weights"][name]
        remembered = state["remembered"].get(name, ())
        layer["statistics"] = {
            statistic: {
                "value": values[statistic] if weight > 0 else None,
                "before": before[statistic] if statistic in remembered else None,
                "weight": weight,
            }
            for statistic, weight in zip(layer_format.statistics, weights, strict=True)
        }
        return layer


def _add_layer(state: State, name: str, layer_format: LayerFormat, layer: Mapping[str, Any]) -> None:
    """Adds this rank's tensors of the layer. The last dot of a key separates the layer from the name of the tensor."""
    cache, dtype = layer["cache"], layer_format.dtype
    for entry, shape in layer_format.local_cache.items():
        state["caches"][f"{name}.{entry}"] = _copy((cache or {}).get(entry), shape, dtype)
    if layer_format.local_cache:
        state["cached"][name] = cache is not None
    if not layer_format.inverts:
        return
    statistics = layer["statistics"]
    state["weights"][name] = tuple(values["weight"] for values in statistics.values())
    for statistic, numbers in layer_format.statistics.items():
        values = statistics[statistic]
        state["statistics"][f"{name}.{statistic}"] = _copy(values["value"], (numbers,), dtype)
        if layer_format.remembers:
            state["before"][f"{name}.{statistic}"] = _copy(values["before"], (numbers,), dtype)
    if layer_format.remembers:
        remembered = (statistic for statistic, values in statistics.items() if values["before"] is not None)
        state["remembered"][name] = tuple(remembered)


def _copy(value: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    if value is None:
        return torch.zeros(tuple(shape), dtype=dtype)
    return value.detach().to("cpu", dtype, copy=True)


def _of(name: str, suffixes: Iterable[str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a layer or parameter, by the suffix after the last dot of their key."""
    return {suffix: tensors[f"{name}.{suffix}"] for suffix in suffixes if f"{name}.{suffix}" in tensors}
