"""The part of a checkpoint beside torch's own state: keyed by layer name, so that it fits any world size.

Every statistic, cache, schedule and counter is saved; captures of a step are not. Neither are local statistics and the
caches made of them, which are of one rank's samples: they are due in the first step after a load. `NGD.state_dict`
makes one state that is whole on every rank, `sharded_state` makes one part per rank.
"""

import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ngd_dist.covered import CoveredLayer, CoveredLayers
from ngd_dist.curvature import Curvature
from ngd_dist.distributed import Sync
from ngd_dist.distributed.comm import Communicator
from ngd_dist.errors import CheckpointError
from ngd_dist.statistics.staleness import Schedule, Track
from ngd_dist.statistics.statistic import Key
from ngd_dist.step.fallback import Fallback
from ngd_dist.step.weights import MomentumMode
from ngd_dist.telemetry import StepStats

__all__ = ["LayerFormat", "SavedState", "check_format", "from_bytes", "to_bytes"]

# Format 3 had the damping of a layer only on the ranks that held it; 2 did not say whether its momentum sums steps or
# directions; 1 had no damping beside the caches.
FORMAT = 4
SETTINGS = ("lr", "momentum", "weight_decay", "damping", "first_lr", "first_damping")
State = dict[str, Any]


@dataclass(frozen=True, slots=True)
class LayerFormat:
    """The saved tensors of one layer, and which of them this rank has.

    `statistics`: the length of each; this rank has them if it `inverts` the layer, and the values before the newest if
    it `remembers`. `cache`: the shape of each entry; this rank has all if it `holds` the layer, else the `shared` ones.
    A layer that `is_local` has no saved cache, and its local statistics are not among those.
    """

    statistics: Mapping[str, int]
    cache: Mapping[str, tuple[int, ...]]
    shared: tuple[str, ...]
    dtype: torch.dtype
    inverts: bool
    holds: bool
    remembers: bool
    is_local: bool

    @property
    def local_cache(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the shape of each entry that this rank has."""
        return self.cache if self.holds else {name: self.cache[name] for name in self.shared}


class SavedState:
    """Reads the state of one optimizer, checks a saved one, and takes it over.

    parameters: those that the optimizer updates, by name, in the order of its param groups. shapes: their whole ones,
    if an engine
        shards them.
    plain: the names of those that the fallback updates.
    """

    def __init__(
        self,
        layers: CoveredLayers,
        curvature: Curvature,
        schedule: Schedule,
        sync: Sync,
        *,
        parameters: Mapping[str, nn.Parameter],
        shapes: Mapping[str, torch.Size],
        plain: Sequence[str],
        fallback: Fallback | None,
        momentum_mode: MomentumMode,
        device: torch.device,
    ) -> None:
        self.parameters = parameters
        self.shapes = shapes
        self.plain = plain if fallback is not None else []
        self.formats = {name: _format(covered, sync) for name, covered in layers.items()}
        self._methods = {name: covered.method for name, covered in layers.items()}
        self._local = {
            Key(n, spec.name) for n, method in self._methods.items() for spec in method.statistics if spec.is_local
        }
        self._curvature = curvature
        self._schedule = schedule
        self._fallback = fallback
        self._momentum_mode = momentum_mode
        self._device = device

    def gather(self, comm: Communicator, stats: StepStats) -> State:
        """Collective. Returns the whole state on every rank."""
        from_ranks = comm.all_gather_object("state_dict", self._owned())
        layers = {name: state for from_rank in from_ranks for name, state in from_rank.items()}
        return self._with_layers(layers, stats)

    def part(self, stats: StepStats) -> State:
        """Returns the state with the layers that this rank owns alone: those of all ranks make the whole."""
        return self._with_layers(self._owned(), stats)

    def local(self, stats: StepStats) -> State:
        """Returns the state as far as this rank has it."""
        return self._with_layers({name: self._layer(name) for name in self.formats}, stats)

    def own(self) -> State:
        """Returns the rest of the `local` state: local statistics, the caches made of them, their schedule."""
        curvature, tracks = self._curvature, self._schedule.tracks
        layers = [name for name, layer_format in self.formats.items() if layer_format.is_local]
        return {
            "statistics": {str(key): curvature.statistics[key].state() for key in self._local},
            "tracks": {str(key): asdict(tracks[key]) for key in self._local},
            "caches": {name: curvature.caches[name] for name in layers},
            "damped_with": {n: used for n, used in curvature.damped_with.items() if n in layers},
        }

    def restore_own(self, saved: Mapping[str, Any]) -> None:
        """Takes over what `own` has returned, after `restore`."""
        for key in self._local:
            self._curvature.statistics[key].load(saved["statistics"][str(key)], self._device)
            self._schedule.tracks[key] = Track(**saved["tracks"][str(key)])
        for name, cache in saved["caches"].items():
            moved = None if cache is None else {entry: value.to(self._device) for entry, value in cache.items()}
            self._curvature.take(name, moved)
        self._curvature.damped_with |= saved["damped_with"]

    def check(self, state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
        """Returns if a whole or local state, torch's own part with it, fits; changes nothing.

        Raises: CheckpointError if it is of another format, of other layers, shapes or settings, or not complete.
        """
        if "ngd" not in state_dict:
            raise CheckpointError(
                f"an NGD state has the key 'ngd', got {sorted(state_dict)}; was it saved by NGD? "
                "torch.distributed.checkpoint.state_dict drops it: save ngd_dist.ShardedState(optimizer) instead"
            )
        saved = state_dict["ngd"]
        check_format(saved.get("format"))
        expected, given = {str(key) for key in self._schedule.tracks}, set(saved["tracks"])
        if expected != given:
            raise CheckpointError(
                "the state is of another model or preconditioner: "
                f"missing {sorted(expected - given)}, unknown {sorted(given - expected)}"
            )
        _entry(saved, "damped_with", "its part 'ngd'")
        for name in self.formats:
            self._check_layer(name, _entry(saved["layers"], name, "layers"))
        _check_groups(state_dict["param_groups"], groups)
        self._check_momentum(saved["momentum_mode"], state_dict)
        self._check_fallback(saved["fallback"])

    def check_cache(self, layer: str, entries: Collection[str]) -> None:
        """Returns if these are the entries of the layer's cache. Raises: CheckpointError."""
        expected = self.formats[layer].cache
        if set(entries) != set(expected):
            raise CheckpointError(
                f"the cache of layer {layer!r} must have {sorted(expected)}, got {sorted(entries)}; "
                "was it saved with another preconditioner or damping_form?"
            )

    def restore(self, saved: Mapping[str, Any]) -> StepStats:
        """Takes over a state that was checked, except torch's own part; returns the counters.

        Raises: CheckpointError, having changed nothing, if the fallback's part does not fit.
        """
        if self._fallback is not None:
            self._fallback.load_state_dict(saved["fallback"] or {})
        for key in self._schedule.tracks:
            self._schedule.tracks[key] = Track(**saved["tracks"][str(key)])
        self._curvature.damped_with = dict(saved["damped_with"])
        for name, layer_format in self.formats.items():
            self._restore_layer(name, layer_format, saved["layers"][name])
            tracks = (track for key, track in self._schedule.tracks.items() if key.layer == name)
            self._curvature.note_rows(name, max(tracks, key=lambda track: track.refreshed).rows)
        return StepStats(
            step=saved["step"], failed_inversions=saved["failed_inversions"], skipped_steps=saved["skipped_steps"]
        )

    def _with_layers(self, layers: dict[str, State], stats: StepStats) -> State:
        return {
            "format": FORMAT,
            "step": stats.step,
            "failed_inversions": stats.failed_inversions,
            "skipped_steps": stats.skipped_steps,
            "momentum_mode": self._momentum_mode,
            "tracks": {
                str(key): track
                for key, track in zip(self._schedule.tracks, self._schedule.state(stats.step, self._local), strict=True)
            },
            "fallback": None if self._fallback is None else self._fallback.state_dict(),
            "damped_with": {n: used for n, used in self._curvature.damped_with.items() if not self.formats[n].is_local},
            "layers": layers,
        }

    def _owned(self) -> dict[str, State]:
        return {name: self._layer(name) for name, layer_format in self.formats.items() if layer_format.remembers}

    def _layer(self, name: str) -> State:
        curvature, layer_format = self._curvature, self.formats[name]
        cache = curvature.caches[name] if layer_format.holds else curvature.caches.elsewhere.get(name)
        cache = None if layer_format.is_local else cache
        state: State = {"cache": None if cache is None else dict(self._methods[name].saved(cache))}
        if layer_format.inverts:
            state["statistics"] = {
                statistic: curvature.statistics[Key(name, statistic)].state() for statistic in layer_format.statistics
            }
        return state

    def _restore_layer(self, name: str, layer_format: LayerFormat, state: State) -> None:
        def here(value: Tensor) -> Tensor:
            return value.to(self._device, layer_format.dtype, copy=True)

        curvature, cache = self._curvature, state["cache"]
        entries = None if cache is None else {entry: here(cache[entry]) for entry in layer_format.local_cache}
        # Present entries must not outlive the restore: the state may have been saved before there was a cache.
        curvature.take(name, None)
        if entries is not None and layer_format.holds:
            entries = self._methods[name].loaded(entries, keeps_rows=name in curvature.with_few_rows)
        curvature.take(name, entries)
        for key in (key for key in self._local if key.layer == name):
            curvature.statistics[key].reset()
        if not layer_format.inverts:
            return
        for statistic in layer_format.statistics:
            values = state["statistics"][statistic]
            moved = {key: None if values[key] is None else here(values[key]) for key in ("value", "before")}
            curvature.statistics[Key(name, statistic)].load(
                moved | {"weight": values["weight"]}, self._device, keeps_rows=name in curvature.with_few_rows
            )

    def _check_layer(self, name: str, state: Mapping[str, Any]) -> None:
        layer_format = self.formats[name]
        if layer_format.inverts or "statistics" in state:
            statistics = _entry(state, "statistics", f"layer {name!r}")
            for statistic, numbers in layer_format.statistics.items():
                where = f"{name}.{statistic}"
                values = _entry(statistics, statistic, f"layer {name!r}")
                _entry(values, "weight", where)
                for value in (_entry(values, "value", where), _entry(values, "before", where)):
                    if value is not None and value.numel() != numbers:
                        raise CheckpointError(
                            f"the state is of another model: {where} must have {numbers} numbers, got {value.numel()}"
                        )
        cache = _entry(state, "cache", f"layer {name!r}")
        if cache is None:
            return
        if "statistics" in state:
            self.check_cache(name, cache)
        for entry, shape in layer_format.local_cache.items():
            given = tuple(_entry(cache, entry, f"the cache of layer {name!r}").shape)
            if given != shape:
                raise CheckpointError(
                    f"the state is of another model: {entry} in the cache of layer {name!r} must be of shape {shape}, "
                    f"got {given}"
                )

    def _check_momentum(self, mode: str, state_dict: Mapping[str, Any]) -> None:
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        buffers = {
            name: state_dict["state"][i]["momentum_buffer"]
            for i, name in zip(ids, self.parameters, strict=True)
            if "momentum_buffer" in state_dict["state"].get(i, {})
        }
        for name, buffer in buffers.items():
            shape = self.shapes.get(name, self.parameters[name].shape)
            if buffer.shape != shape:
                raise CheckpointError(
                    f"the state is of another model: the momentum of {name!r} must be of shape "
                    f"{tuple(shape)}, got {tuple(buffer.shape)}"
                )
        if buffers and _sums_steps(mode) != _sums_steps(self._momentum_mode):
            raise CheckpointError(
                f"the momentum was saved under momentum_mode {mode!r}, which does not mean the same under "
                f"{self._momentum_mode!r}; keep the momentum_mode and step_length that it was saved with"
            )

    def _check_fallback(self, saved: Mapping[str, Any] | None) -> None:
        if saved is None and self.plain:
            raise CheckpointError(
                "the state was saved without fallback adamw; keep the fallback that it was saved with"
            )
        if saved and self._fallback is None:
            raise CheckpointError(
                "the state was saved with fallback adamw; keep the fallback and step_length that it was saved with"
            )


def to_bytes(state: State) -> bytes:
    """Returns a state as torch saves it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def from_bytes(saved: bytes) -> State:
    """Returns the state that was saved."""
    state: State = torch.load(io.BytesIO(saved), weights_only=True)
    return state


def check_format(given: object) -> None:
    """Returns if a state of this format can be read. Raises: CheckpointError."""
    if given != FORMAT:
        raise CheckpointError(
            f"the state's format must be {FORMAT}, got {given}; resume with the version of ngd_dist that saved it"
        )


def _format(covered: CoveredLayer, sync: Sync) -> LayerFormat:
    is_local = sync.is_local(covered.name)
    return LayerFormat(
        statistics={spec.name: spec.form.numbers for spec in covered.method.statistics if not spec.is_local},
        cache={} if is_local else covered.method.cache_shapes,
        shared=() if is_local else covered.method.shared,
        dtype=covered.layer.dtype,
        inverts=sync.inverts(covered.name),
        holds=sync.holds(covered.name),
        remembers=sync.reports(covered.name),
        is_local=is_local,
    )


def _sums_steps(mode: str) -> bool:
    """Returns whether the momentum buffer is a sum of steps, which contain lr, and not of directions."""
    return mode != "correct"


def _check_groups(saved: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> None:
    sizes, given = [len(group["params"]) for group in groups], [len(group["params"]) for group in saved]
    if sizes != given:
        raise CheckpointError(
            f"the state's param_groups don't fit: they must have {sizes} parameters, got {given}; build the optimizer "
            "with the param_groups that it was saved with"
        )
    for i, group in enumerate(saved):
        for name in SETTINGS:
            _entry(group, name, f"param_groups[{i}]")


def _entry(mapping: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in mapping:
        raise CheckpointError(f"the state is not complete: {where} has no {key!r}, got {sorted(mapping)}")
    return mapping[key]
