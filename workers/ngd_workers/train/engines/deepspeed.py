"""DeepSpeed's ZeRO: each rank holds a part of the optimizer's state, and of gradients and weights at higher stages."""

import contextlib
import functools
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn, optim

from ngd_dist import NGD
from ngd_dist.engines.deepspeed import DeepSpeed as DeepSpeedPieces
from ngd_dist.engines.deepspeed import Inner, initialize
from ngd_dist.step.joining import join
from ngd_workers.contract.errors import SpecError
from ngd_workers.contract.spec import DeepSpeed
from ngd_workers.train.engines.base import Build, Engine

__all__ = ["DeepSpeedEngine"]


class DeepSpeedEngine(Engine):
    """DeepSpeed's engine in float32, whose own step calls the job's optimizer."""

    talks_in_forward = True

    def wrap(self, build: Build) -> None:
        choice = self._spec.effective_engine
        assert isinstance(choice, DeepSpeed)
        self._stage, is_ngd = choice.stage, self._spec.optimizer.kind == "ngd"
        settings = choice.settings(
            global_size=self._spec.batch.global_size,
            micro_size=self._spec.micro_size,
            micro_batches=self._spec.micro_batches,
        )
        self._shapes = {i: p.shape for i, p in enumerate(self.model.parameters()) if p.requires_grad}
        inner = Inner(self.model.parameters()) if is_ngd else self._build(build, self.model)
        try:
            with _without_effect(inner):
                self.forward = self._engine = initialize(self.model, settings, inner)
        except ModuleNotFoundError as error:
            raise SpecError(
                f"engine deepspeed needs a package that the workers don't have: {error}; install ngd-workers[deepspeed]"
            ) from error
        self.optimizer = self._build(build, self._engine) if is_ngd else inner

    @contextlib.contextmanager
    def accumulating(self, is_last: bool) -> Iterator[None]:
        yield
        if not is_last:
            self._engine.step()  # only counts

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)  # the loss has its weight

    def update(self, lr: float | None, **arguments: Any) -> None:
        assert lr is not None, "settings that choose lr are refused with the job"
        assert not arguments
        self._set_lr(lr)
        self._engine.step()

    @property
    def gradient_bytes(self) -> dict[str, int]:
        gathers = (1, 1, 1, 2)[self._stage]
        return {"gradients": self._in_ring(), "weights": gathers * self._in_ring()}

    def weights(self) -> dict[str, Any]:
        with self._whole():
            found: dict[str, Any] = self.model.state_dict()
            return {name: value.clone() if isinstance(value, Tensor) else value for name, value in found.items()}

    def optimizer_state(self) -> dict[str, Any]:
        if isinstance(self.optimizer, NGD) or self._stage == 0:
            return super().optimizer_state()
        state = self.optimizer.state.get(self._flat, {})
        whole: dict[int, dict[str, Any]] = {}
        for name, value in state.items():
            parts = self._comm.all_gather_object(f"optimizer state {name}", value.cpu())
            for index in self._shapes:
                of_one = whole.setdefault(index, {})
                of_one[name] = value.clone() if value.ndim == 0 else self._joined(parts, index)
        (group,) = self.optimizer.param_groups
        settings = {name: value for name, value in group.items() if name != "params"}
        places = list(range(sum(1 for _ in self.model.parameters())))  # frozen ones have theirs too, as in torch's
        return {"state": whole, "param_groups": [settings | {"params": places}]}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        if isinstance(self.optimizer, NGD) or self._stage == 0:
            super().load_optimizer_state(state)
            return
        (group,), (saved,) = self.optimizer.param_groups, state["param_groups"]
        group.update({name: value for name, value in saved.items() if name != "params"})
        if not state["state"]:
            return
        flat, like = self._flat, next(iter(state["state"].values()))
        of_flat = {name: torch.zeros_like(flat) if value.ndim else value.clone() for name, value in like.items()}
        for index, (start, at, length) in self._ranges[self._comm.rank].items():
            for name, value in state["state"].get(index, {}).items():
                if value.ndim:
                    of_flat[name].narrow(0, at, length).copy_(value.flatten().narrow(0, start, length))
        self.optimizer.state[flat] = of_flat

    @property
    def _flat(self) -> Tensor:
        """This rank's range of all parameters in float32, of which the optimizer has its state."""
        zero = self._engine.optimizer
        flats = zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        (flat,) = flats
        return flat  # type: ignore[no-any-return]

    @functools.cached_property
    def _ranges(self) -> list[dict[int, tuple[int, int, int]]]:
        """Of each rank, by parameter: where its piece begins in the parameter, where in the flat tensor, its length.

        Collective when it is first read.
        """
        parameters = list(self.model.parameters())
        pieces = DeepSpeedPieces(self._engine).pieces([parameters[index] for index in self._shapes])
        begin = self._flat.storage_offset()
        own = {
            index: (pieces[p].start, pieces[p].weight.storage_offset() - begin, len(pieces[p].weight))
            for index, p in enumerate(parameters)
            if p in pieces
        }
        return self._comm.all_gather_object("ranges of the parameters", own)

    def _joined(self, parts: list[Tensor], index: int) -> Tensor | None:
        starts, pieces = [], []
        for part, ranges in zip(parts, self._ranges, strict=True):
            if index in ranges:
                start, at, length = ranges[index]
                starts.append(start)
                pieces.append(part[at : at + length])
        return join(pieces, starts, self._shapes[index])

    def _whole(self) -> contextlib.AbstractContextManager[object]:
        """Returns a context in which every rank has all weights."""
        if self._stage < 3:
            return contextlib.nullcontext()
        parameters: list[nn.Parameter] = list(self.model.parameters())
        gathered: contextlib.AbstractContextManager[object] = import_module("deepspeed").zero.GatheredParameters(
            parameters
        )
        return gathered


@contextlib.contextmanager
def _without_effect(optimizer: optim.Optimizer) -> Iterator[None]:
    """Undoes the step with zero gradients by which ZeRO 3 has an optimizer make its state: no decay, no count."""
    off = {"lr": 0.0, "weight_decay": 0.0}
    before = [{name: group[name] for name in off if name in group} for group in optimizer.param_groups]
    for group, kept in zip(optimizer.param_groups, before, strict=True):
        group.update({name: off[name] for name in kept})
    yield
    for group, kept in zip(optimizer.param_groups, before, strict=True):
        group.update(kept)
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()
