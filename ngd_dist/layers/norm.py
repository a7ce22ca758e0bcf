"""The base of all normalisations: one small Fisher block per unit, for its scale and, if it has one, its shift.

A layer's inputs are the numbers that are scaled, so that g * a is a sample's gradient of the scale, and g that of the
shift.
Source: [OT20], unit-wise.
"""

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ngd_dist.factors.cost import LayerShape
from ngd_dist.layers.base import Layer
from ngd_dist.layers.run import of_samples

__all__ = ["ChannelNorm", "Norm"]


class Norm(Layer):
    """Rows a_BNPI are [1, N, P, O], one normalised number per unit; the gradient matrix is [1, O, 1 or 2]."""

    @cached_property
    def shape(self) -> LayerShape:
        return LayerShape(self.name, "unit_wise", len(self.parameters), self.shapes[0].numel())

    def inputs(self, kept: Any) -> Tensor:
        return self._rows(self._normalised(kept))

    def some_samples(self, kept: Any, part: range, samples: int) -> Tensor | None:
        # Those that keep more are normalised by all samples together.
        return of_samples(kept, part, samples, self.batch_dim) if isinstance(kept, Tensor) else None

    def output_gradients(self, kept: Any, g: Tensor) -> Tensor:
        return self._rows(g.to(self.dtype))

    def along(self, a_BNPI: Tensor, g_BNPO: Tensor, direction_BOI: Tensor) -> Tensor:
        scale_BO, *shift = direction_BOI.unbind(-1)
        output = a_BNPI * scale_BO if not shift else a_BNPI * scale_BO + shift[0]
        return (output * g_BNPO).sum((0, 2, 3))

    def join(self, gradients: Sequence[Tensor]) -> Tensor:
        return torch.stack([gradient.flatten().to(self.dtype) for gradient in gradients], dim=-1).unsqueeze(0)

    def split(self, direction_BOI: Tensor) -> list[Tensor]:
        columns = direction_BOI[0].unbind(-1)
        return [c.reshape(shape) for c, shape in zip(columns, self.shapes, strict=True)]

    @abstractmethod
    def _normalised(self, kept: Any) -> Tensor:
        """Returns the input of the scale, in the shape of the layer's input and in the statistics' dtype."""

    @abstractmethod
    def _rows(self, x: Tensor) -> Tensor:
        """Returns [1, N, P, O] from a tensor of the shape of the layer's input."""


class ChannelNorm(Norm):
    """x [N, C, ...]: units are channels, positions are all that comes after them."""

    @classmethod
    def split_module(cls, name: str, module: nn.Module, *, batch_dim: int = 0) -> list[Layer]:
        return [cls(name, module)]  # channels are dimension 1 in every model

    def expected_input(self, x: Tensor) -> str | None:
        return None if x.ndim >= 2 else "[samples, channels, ...]"

    def _rows(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], -1).mT.unsqueeze(0)
