"""nn.Conv1d, 2d and 3d: positions are the output's pixels, inputs the flattened patch that each one sees."""

from math import prod

import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist.cost import LayerShape
from ngd_dist.layers.base import Layer

__all__ = ["Conv"]

AXES = {1: "length", 2: "height, width", 3: "depth, height, width"}


class Conv(Layer):
    """x [N, C, *space] -> y [N, O, *space'] with stride, dilation, groups, and every padding and padding mode.

    Each group is a block of its own, with the inputs and the outputs of that group alone. Source: [GM16].
    """

    module: nn.Conv1d | nn.Conv2d | nn.Conv3d

    @classmethod
    def parts(cls, name: str, module: nn.Module, *, batch_dim: int = 0) -> list[Layer]:
        return [cls(name, module)]  # torch's convolutions count samples in dimension 0, whatever the model does

    def expected_input(self, x: Tensor) -> str | None:
        dims = len(self.module.kernel_size)
        return None if x.ndim == dims + 2 else f"[samples, channels, {AXES[dims]}]"

    @property
    def shape(self) -> LayerShape:
        weight, groups = self._weight, self.module.groups
        inputs = weight[0].numel() + (self._bias is not None)
        return LayerShape(self.name, "kronecker", inputs, weight.shape[0] // groups, blocks=groups)

    def inputs(self, kept: Tensor) -> Tensor:
        """Returns rows that lie in memory as [B, I, N, P].

        The innermost copy then runs along an axis of the image: 2 to 5 times as fast as F.unfold and its transpose
        (3x3 patches of 64x56x56 and of 16x16x16, one CPU thread), and as fast a factor of the rows for second moments.
        """
        conv = self.module
        windows = self._windows(self._padded(kept.to(self.dtype)))
        dims = len(conv.kernel_size)
        samples, space = windows.shape[0], windows.shape[2 : 2 + dims]
        B, I = conv.groups, self._weight[0].numel()  # noqa: E741
        rows_BINP = windows.new_ones(B, I + (self._bias is not None), samples, prod(space))
        patch = (self._weight.shape[1], *conv.kernel_size)
        target = rows_BINP[:, :I].unflatten(1, patch).unflatten(-1, space)
        # [N, C, *space, *kernel] -> [B, C of the group, *kernel, N, *space]
        grouped = windows.unflatten(1, (B, patch[0]))
        kernel_axes, space_axes = range(3 + dims, 3 + 2 * dims), range(3, 3 + dims)
        target.copy_(grouped.permute(1, 2, *kernel_axes, 0, *space_axes))
        rows_BNPI: Tensor = rows_BINP.permute(0, 2, 3, 1)
        return rows_BNPI

    def output_gradients(self, kept: Tensor, g: Tensor) -> Tensor:
        g_NBOP: Tensor = g.flatten(2).unflatten(1, (self.module.groups, -1))
        return g_NBOP.permute(1, 0, 3, 2).to(self.dtype)

    def _windows(self, padded: Tensor) -> Tensor:
        """Returns the patches as a view, [N, C, *space, *kernel]."""
        conv = self.module
        for axis, (size, stride, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
            padded = padded.unfold(2 + axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        return padded

    def _padded(self, x: Tensor) -> Tensor:
        sides = self._padding()
        if not any(sides):
            return x
        mode = self.module.padding_mode
        return F.pad(x, sides, mode="constant" if mode == "zeros" else mode)

    def _padding(self) -> list[int]:
        """Returns (left, right, top, bottom, ...): F.pad counts from the last dimension."""
        conv = self.module
        sides: list[int] = []
        for axis in reversed(range(len(conv.kernel_size))):
            if conv.padding == "same":
                total = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
                sides += [total // 2, total - total // 2]
            elif conv.padding != "valid":
                sides += [int(conv.padding[axis])] * 2
        return sides
