"""nn.BatchNorm2d: one 2x2 Fisher block per channel, for its scale and its shift."""

import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist.cost import LayerShape
from ngd_dist.layers.base import Layer

__all__ = ["BatchNorm"]


class BatchNorm(Layer):
    """x [N, C, H, W]; inputs are the normalised x, so that g * a is a sample's gradient of the scale.

    The gradient matrix is [C, 2]: scale, shift. In training mode the batch statistics couple the samples; taking
    them as given, as everyone does, makes "a sample's gradient" an approximation. Source: [OT20], unit-wise.
    """

    module: nn.BatchNorm2d

    @classmethod
    def uncovered(cls, module: nn.Module) -> str | None:
        return None if module.bias is not None else "BatchNorm2d without bias"

    def expected_input(self, x: Tensor) -> str | None:
        return None if x.ndim == 4 else "[samples, channels, height, width]"

    @property
    def shape(self) -> LayerShape:
        return LayerShape(self.name, "unit_wise", 2, self._weight.shape[0])

    def inputs(self, kept: Tensor) -> Tensor:
        norm = self.module
        uses_batch = norm.training or norm.running_mean is None
        mean, variance = (None, None) if uses_batch else (norm.running_mean, norm.running_var)
        # No running statistics are passed when the batch's are used: this second pass must not update them.
        normalised = F.batch_norm(kept.to(self.dtype), mean, variance, training=uses_batch, eps=norm.eps)
        return normalised.flatten(2).mT.unsqueeze(0)

    def output_gradients(self, g: Tensor) -> Tensor:
        return g.flatten(2).mT.to(self.dtype).unsqueeze(0)
