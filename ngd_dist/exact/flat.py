"""A model as a function of one flat vector of its trainable weights."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ngd_dist.errors import ConfigError

__all__ = ["FlatModel"]


class FlatModel:
    """A model whose trainable weights are one vector [W], in the order of `named_parameters`.

    Frozen parameters and buffers are the module's own.

    >>> flat = FlatModel(nn.Linear(2, 1))
    >>> flat.size
    3
    """

    def __init__(self, model: nn.Module) -> None:
        """Raises: ConfigError if there is nothing to train, or the weights differ in dtype or device."""
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        kinds = {(weight.dtype, weight.device) for weight in trained.values()}
        if not trained:
            raise ConfigError("the model has no trainable parameter, so there is no step to take")
        if len(kinds) > 1:
            found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
            raise ConfigError(f"all trainable parameters must be of one dtype on one device, got {found}")
        ((self.dtype, self.device),) = kinds
        if not self.dtype.is_floating_point:
            raise ConfigError(f"trainable parameters must be real numbers, got {self.dtype}")
        self._model = model
        self._names = list(trained)
        self.parameters = list(trained.values())
        self._sizes = [weight.numel() for weight in self.parameters]
        self.size = sum(self._sizes)

    def weights(self) -> Tensor:
        """Returns a copy of the weights, [W]."""
        return torch.cat([weight.detach().reshape(-1) for weight in self.parameters])

    def split(self, vector: Tensor) -> list[Tensor]:
        """Returns the parts [shape of each parameter] of a vector [W]."""
        parts = vector.split(self._sizes)
        return [part.view(weight.shape) for part, weight in zip(parts, self.parameters, strict=True)]

    @torch.no_grad()
    def assign(self, vector: Tensor) -> None:
        """Gives the model the weights of a vector [W]."""
        for weight, part in zip(self.parameters, self.split(vector), strict=True):
            weight.copy_(part)

    def at(self, vector: Tensor, x: Tensor) -> Tensor:
        """Returns the output of the model with the weights `vector` [W] at one point [d]: a scalar, or [O] if O > 1.

        The model itself gets a batch [1, d], as it would in any other training.
        """
        named: dict[str, Any] = dict(zip(self._names, self.split(vector), strict=True))
        output: Tensor = functional_call(self._model, named, (x.unsqueeze(0),)).squeeze(0)
        return output.reshape(()) if output.numel() == 1 else output
