"""torch's FSDP2: every rank holds a part of each weight, of its gradient and of the optimizer's state."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ngd_dist import NGD
from ngd_workers.contract.spec import FSDP
from ngd_workers.train.engines.base import Build, Engine

__all__ = ["FSDPEngine"]


class FSDPEngine(Engine):
    """The blocks of the model are sharded each by itself, so that one block's whole weights are held at a time."""

    talks_in_forward = True

    def wrap(self, build: Build) -> None:
        choice = self._spec.effective_engine
        assert isinstance(choice, FSDP)
        mesh = init_device_mesh(self._device.type, (dist.get_world_size(),))
        for module in (*blocks_of(self.model), self.model):
            fully_shard(module, mesh=mesh, reshard_after_forward=choice.reshard_after_forward)
        self.forward, self.optimizer = self.model, self._build(build, self.model)

    @contextlib.contextmanager
    def accumulating(self, is_last: bool) -> Iterator[None]:
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(is_last)
        yield

    @property
    def gradient_bytes(self) -> dict[str, int]:
        choice = self._spec.effective_engine
        gathers = 2 if isinstance(choice, FSDP) and choice.reshard_after_forward else 1
        return {"gradients": self._in_ring(), "weights": gathers * self._in_ring()}

    def weights(self) -> dict[str, Any]:
        return _each(self.model.state_dict(), _whole)

    def optimizer_state(self) -> dict[str, Any]:
        state = super().optimizer_state()
        return state if isinstance(self.optimizer, NGD) else state | {"state": _each(state["state"], _whole)}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        if not isinstance(self.optimizer, NGD):
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            sharded = {
                i: {k: _like(v, parameters[i]) for k, v in of_one.items()} for i, of_one in state["state"].items()
            }
            state = state | {"state": sharded}
        super().load_optimizer_state(state)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Returns the modules with parameters in every ModuleList and Sequential of the model, the inner ones first."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    blocks = [child for module in lists for child in module if any(True for _ in child.parameters())]
    return list(dict.fromkeys(reversed(blocks)))


def _each(values: Mapping[Any, Any], change: Callable[[Any], Any]) -> dict[Any, Any]:
    """Returns the values of nested dictionaries, changed, in the same order on every rank."""
    return {k: _each(v, change) if isinstance(v, Mapping) else change(v) for k, v in values.items()}


def _whole(value: Any) -> Any:
    """Collective for a sharded tensor. Returns all of it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _like(value: Any, like: Any) -> Any:
    """Returns a whole tensor, sharded as another of its shape is."""
    is_sharded = isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements) if is_sharded else value
