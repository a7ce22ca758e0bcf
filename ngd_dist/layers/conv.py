"""nn.Conv2d: positions are the output's pixels, inputs the flattened patch that each one sees."""

import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist.cost import LayerShape
from ngd_dist.layers.base import Layer

__all__ = ["Conv"]


class Conv(Layer):
    """x [N, C, H, W] -> y [N, O, H', W'] with stride, dilation and every padding and padding mode. Source: [GM16]."""

    module: nn.Conv2d

    @classmethod
    def uncovered(cls, module: nn.Module) -> str | None:
        assert isinstance(module, nn.Conv2d)
        return f"Conv2d with groups={module.groups}" if module.groups != 1 else None

    def expected_input(self, x: Tensor) -> str | None:
        return None if x.ndim == 4 else "[samples, channels, height, width]"

    @property
    def shape(self) -> LayerShape:
        weight = self._weight
        inputs = weight[0].numel() + (self._bias is not None)
        return LayerShape(self.name, "kronecker", inputs, weight.shape[0])

    def inputs(self, kept: Tensor) -> Tensor:
        conv = self.module
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        padded = F.pad(kept.to(self.dtype), self._padding(), mode=mode)
        patches_NIP = F.unfold(padded, conv.kernel_size, dilation=conv.dilation, stride=conv.stride)
        return self._with_ones(patches_NIP.mT.unsqueeze(0))

    def output_gradients(self, g: Tensor) -> Tensor:
        return g.flatten(2).mT.to(self.dtype).unsqueeze(0)

    def _padding(self) -> list[int]:
        """Returns (left, right, top, bottom): F.pad counts from the last dimension."""
        conv = self.module
        if conv.padding == "valid":
            return [0, 0, 0, 0]
        sides: list[int] = []
        for axis in (1, 0):
            if conv.padding == "same":
                total = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
                sides += [total // 2, total - total // 2]
            else:
                sides += [int(conv.padding[axis])] * 2
        return sides
