"""The optimizers under test as a benchmark sees them: one training step, and the bytes of its state."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.held_bytes import held_bytes

__all__ = ["DAMPING", "MOMENTUM", "STEP_LENGTH", "Peer", "Refresh", "Setting", "Trainer", "Training"]

Refresh = Literal["1/1", "1/10", "10/10", "adaptive"]
STEP_LENGTH, MOMENTUM, DAMPING = 1e-3, 0.9, 0.1  # for all optimizers: a timing needs finite losses, not the best ones


@dataclass(frozen=True)
class Setting:
    """The settings that a timing varies."""

    refresh: Refresh = "1/1"
    lr: float = STEP_LENGTH

    @property
    def statistics_every(self) -> int:
        return int(self.refresh.split("/")[0])

    @property
    def inverses_every(self) -> int:
        return int(self.refresh.split("/")[1])


class Trainer(Protocol):
    """One model with its optimizer, in one process."""

    name: str
    model: nn.Module

    def step(self, x: Tensor, y: Tensor) -> float:
        """Takes one whole training step, gradients zeroed first; returns the loss."""

    def run(self, x: Tensor, y: Tensor) -> Tensor:
        """Takes a step as `step` does, without waiting for the loss: on a GPU the queue stays full."""

    def state_bytes(self) -> dict[str, int]:
        """Returns bytes by kind: statistics, inverses, momentum, ... without the model and its gradients."""


@dataclass
class Training:
    """A training step of the common shape: forward, backward, `update`.

    holders: the objects that own the optimizer's tensors. kinds: as for `held_bytes`.
    """

    name: str
    model: nn.Module
    update: Callable[[Tensor, Tensor], None]
    holders: object
    kinds: dict[str, str] = field(default_factory=dict)

    def step(self, x: Tensor, y: Tensor) -> float:
        return float(self.run(x, y))

    def run(self, x: Tensor, y: Tensor) -> Tensor:
        self.model.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.update(x, y)
        return loss.detach()

    def state_bytes(self) -> dict[str, int]:
        return held_bytes(self.holders, self.kinds, excluded=self.model)


@dataclass(frozen=True)
class Peer:
    """The builder of one optimizer, and its abilities.

    needs: the module that has it. refreshes: those that it offers; without statistics they are all the same.
    lacks: returns the reason why it can't run although `needs` is there, or None.
    """

    build: Callable[[nn.Module, Setting], Any]
    needs: str = "torch"
    refreshes: tuple[Refresh, ...] = ("1/1",)
    lacks: Callable[[], str | None] = lambda: None
