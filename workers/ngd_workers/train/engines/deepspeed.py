"""DeepSpeed's ZeRO: each rank holds a part of the optimizer's state, and of gradients and weights at higher stages."""

import contextlib
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ngd_dist import NGD
from ngd_dist.engines import Inner, initialize
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
        inner = Inner(self.model.parameters()) if is_ngd else self._build(build, self.model)
        try:
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
        for group in self.optimizer.param_groups:
            group["lr"] = lr
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
        if isinstance(self.optimizer, NGD):
            return self.optimizer.state_dict_part()
        fragments = import_module("deepspeed.utils")
        state = self.optimizer.state_dict()
        (group,) = state["param_groups"]
        parameters = list(self.model.parameters())
        whole: dict[int, dict[str, Any]] = {}
        if self._stage == 0:
            return state
        names = {name: value for of_one in self.optimizer.state.values() for name, value in of_one.items()}
        for index, parameter in enumerate(p for p in parameters if p.requires_grad):
            whole[index] = {
                name: value if value.ndim == 0 else fragments.safe_get_full_optimizer_state(parameter, name)
                for name, value in names.items()
                if isinstance(value, Tensor)
            }
        return {"state": whole, "param_groups": [group | {"params": list(whole)}]}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        if isinstance(self.optimizer, NGD) or self._stage == 0:
            self.optimizer.load_state_dict(state)
            return
        fragments = import_module("deepspeed.utils")
        (group,), (saved,) = self.optimizer.param_groups, state["param_groups"]
        group.update({name: value for name, value in saved.items() if name != "params"})
        if not state["state"]:
            return
        like = state["state"][0]
        for flat in group["params"]:  # DeepSpeed sets values of a state that is there
            self.optimizer.state[flat] = {
                name: torch.zeros_like(flat) if value.ndim else value.clone() for name, value in like.items()
            }
        for index, parameter in enumerate(p for p in self.model.parameters() if p.requires_grad):
            for name, value in state["state"][index].items():
                if value.ndim:
                    fragments.safe_set_full_optimizer_state(parameter, value, name)

    def _whole(self) -> contextlib.AbstractContextManager[object]:
        """Returns a context in which every rank has all weights."""
        if self._stage < 3:
            return contextlib.nullcontext()
        parameters: list[nn.Parameter] = list(self.model.parameters())
        gathered: contextlib.AbstractContextManager[object] = import_module("deepspeed").zero.GatheredParameters(
            parameters
        )
        return gathered
