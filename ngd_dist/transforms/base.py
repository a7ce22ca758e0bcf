"""The contract of a method that changes the model: other coordinates in training, plain layers for everybody else."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn, optim

__all__ = ["Transform"]


class Transform(ABC):
    """A change of the model's coordinates. It is built before the optimizer, which trains the new parameters.

    A transform changes the modules in place, and not the function that the model computes. Every rank builds it, from
    equal weights, and calls its methods in the same order.
    """

    @abstractmethod
    def __init__(self, model: nn.Module, config: Any = None, *, process_group: dist.ProcessGroup | None = None) -> None:
        """Changes the model. Raises: ConfigError if the settings or the engine don't fit it."""

    @abstractmethod
    def step(self, *optimizers: optim.Optimizer) -> None:
        """Collective. Called after each optimizer step; may change the coordinates, and takes the state along."""

    @abstractmethod
    def plain_state_dict(self) -> dict[str, Any]:
        """Returns the state dict of the plain model, under its own names, while the model stays as it is."""

    @abstractmethod
    def fold(self, *optimizers: optim.Optimizer) -> None:
        """Makes the model plain again, with the same function; the optimizers go on in its coordinates."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Returns everything that training goes on from beside the plain model and the optimizer, in tensors."""

    @abstractmethod
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over a state. Raises: CheckpointError, with nothing changed, if it is of another model."""
