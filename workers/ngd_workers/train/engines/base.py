"""The contract of an engine: a job's model and its optimizer on one rank, from the loss to the next weights."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn, optim

from ngd_dist import NGD
from ngd_dist.distributed.comm import Communicator
from ngd_workers.contract.spec import JobSpec

__all__ = ["Build", "Engine"]

Build = Callable[..., optim.Optimizer]  # (model, **keywords of NGD) -> the job's optimizer
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Engine(ABC):
    """Collective: every rank builds it, from equal weights, and calls its methods in the same order.

    forward: what training calls; it may be a wrapper. model: the model inside, whose parameters may be sharded.
    optimizer: the job's; its step is taken by `update`.
    """

    talks_in_forward: ClassVar[bool] = False  # so that an error of a forward pass may be the death of another rank

    forward: nn.Module
    optimizer: optim.Optimizer

    def __init__(self, model: nn.Module, spec: JobSpec, comm: Communicator, device: torch.device) -> None:
        self.model, self._spec, self._comm, self._device = model, spec, comm, device
        self._size = sum(p.nbytes for p in model.parameters() if p.requires_grad)  # before an engine cuts them
        # Without fp16 it does nothing.
        self._scaler = torch.amp.GradScaler(device.type, enabled=spec.precision == "fp16")

    @abstractmethod
    def wrap(self, build: Build) -> None:
        """Sets `forward` and `optimizer`. Raises: as `build` does."""

    def precise(self) -> contextlib.AbstractContextManager[object]:
        """Returns a context in which products run in the precision of the spec."""
        dtype = AUTOCAST.get(self._spec.precision)
        return contextlib.nullcontext() if dtype is None else torch.autocast(self._device.type, dtype)

    def accumulating(self, is_last: bool) -> contextlib.AbstractContextManager[object]:
        """Returns a context for one micro-batch, in which gradients are averaged over ranks only for the last."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of the loss, weighted as a part of this rank's mean."""
        self._scaler.scale(loss).backward()

    def update(self, lr: float | None, **arguments: Any) -> None:
        """Takes one optimizer step and clears the gradients. lr: the job's; None: the optimizer chooses its own.

        arguments: of the optimizer's step.
        """
        if lr is not None:
            self._set_lr(lr)
        self._scaler.step(self.optimizer, **arguments)
        self._scaler.update()
        self.optimizer.zero_grad()

    @property
    @abstractmethod
    def gradient_bytes(self) -> dict[str, int]:
        """Bytes that this rank sends in a step outside the optimizer, by kind."""

    def weights(self) -> dict[str, Any]:
        """Collective. Returns the model's whole state dict."""
        return self.model.state_dict()

    def optimizer_state(self) -> dict[str, Any]:
        """Collective. Returns the optimizer's state: whole on rank 0; under NGD this rank's part, for `NGD.joined`."""
        return self.optimizer.state_dict_part() if isinstance(self.optimizer, NGD) else self.optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Takes over a whole state. Raises: as the optimizer does."""
        self.optimizer.load_state_dict(state)

    @property
    def loss_scale(self) -> dict[str, Any]:
        """The state of the loss scale, which a resumed job goes on with; empty without fp16."""
        return self._scaler.state_dict()

    def load_loss_scale(self, state: dict[str, Any]) -> None:
        """Takes over the state of a loss scale; an empty one leaves it as it is."""
        if state and self._scaler.is_enabled():
            self._scaler.load_state_dict(state)

    def _set_lr(self, lr: float) -> None:
        """Sets the lr of each param group: the job's, times the group's `lr_ratio` if it has one."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)

    def _in_ring(self) -> int:
        """Returns the bytes that a rank sends to reduce-scatter all gradients, or to gather all weights, in a ring."""
        return self._size * (self._comm.world_size - 1) // self._comm.world_size

    def _build(self, build: Build, model: nn.Module) -> optim.Optimizer:
        """Returns the optimizer of the model, which hears of the loss scale."""
        is_scaled_ngd = self._scaler.is_enabled() and self._spec.optimizer.kind == "ngd"
        return build(model, grad_scaler=self._scaler) if is_scaled_ngd else build(model)
