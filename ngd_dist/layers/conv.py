"""nn.Conv1d, 2d and 3d: positions are the output's pixels, inputs the flattened patch of each pixel."""

from functools import cached_property
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist.factors.cost import LayerShape
from ngd_dist.layers.autocorrelation import Window, is_worthwhile, patch_moment
from ngd_dist.layers.base import Layer
from ngd_dist.layers.patches import image_of, patch_rows, windows_of
from ngd_dist.layers.run import of_samples

__all__ = ["Conv"]


class _Read(NamedTuple):
    """The pixels of an input that a convolution reads, and its windows on them."""

    x: Tensor
    windows: list[Window]


class Conv(Layer):
    """x [N, C, *space] -> y [N, O, *space'] with stride, dilation, groups, and every padding and padding mode.

    Each group is a block, with the inputs and the outputs of that group alone. Source: [GM16].
    """

    module: nn.Conv1d | nn.Conv2d | nn.Conv3d
    is_stackable = True

    @classmethod
    def split_module(cls, name: str, module: nn.Module, *, batch_dim: int = 0) -> list[Layer]:
        return [cls(name, module)]  # torch's convolutions count samples in dimension 0

    def expected_input(self, x: Tensor) -> str | None:
        return image_of(len(self.module.kernel_size), x)

    @cached_property
    def shape(self) -> LayerShape:
        (outputs, *patch), groups = self.shapes[0], self.module.groups
        inputs = prod(patch) + (self._bias is not None)
        return LayerShape(self.name, "kronecker", inputs, outputs // groups, blocks=groups)

    def inputs(self, kept: Tensor) -> Tensor:
        windows = self._windows(self._padded(kept.to(self.dtype)))
        return patch_rows(windows, self.module.groups, has_ones=self._bias is not None)

    def input_moment(self, kept: Tensor) -> Tensor:
        read = self._read_with_stride_1(kept.to(self.dtype))
        groups = self.module.groups
        if read is None or not is_worthwhile(read.windows, read.x.shape[1] // groups, len(kept)):
            return super().input_moment(kept)
        moment = patch_moment(read.x, read.windows, groups)
        return moment if self._bias is None else self._with_sums(moment, kept.to(self.dtype))

    def some_samples(self, kept: Tensor, part: range, samples: int) -> Tensor:
        return of_samples(kept, part, samples)

    def output_gradients(self, kept: Tensor, g: Tensor) -> Tensor:
        g_NBOP: Tensor = g.flatten(2).unflatten(1, (self.module.groups, -1))
        return g_NBOP.permute(1, 0, 3, 2).to(self.dtype)

    def _read_with_stride_1(self, x: Tensor) -> _Read | None:
        """Returns the pixels that are read, with their windows, if strides leave out only whole rows and columns."""
        conv, sides = self.module, self._padding()
        if conv.padding_mode != "zeros":
            x, sides = self._padded(x), [0] * len(sides)
        windows = []
        for axis, (size, stride, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
            start = len(sides) - 2 * (axis + 1)
            padding = (sides[start], sides[start + 1])
            if stride > 1:
                if size > 1 or any(padding):
                    return None
                x = x.unfold(2 + axis, 1, stride).squeeze(-1)
            windows.append(Window(x.shape[2 + axis], size, dilation, padding))
        return _Read(x, windows)

    def _with_sums(self, moment_BII: Tensor, x: Tensor) -> Tensor:
        """Returns the moment of patches that end in a 1: it has their sum beside it, and their number in the corner."""
        patches = self._windows(self._padded(x.sum(0, keepdim=True)))[0]
        space = range(1, 1 + len(self.module.kernel_size))
        sum_BI1 = patches.sum(tuple(space)).view(len(moment_BII), -1, 1)
        count = sum_BI1.new_full((len(moment_BII), 1, 1), len(x) * prod(patches.shape[axis] for axis in space))
        return torch.cat([torch.cat([moment_BII, sum_BI1], 2), torch.cat([sum_BI1.mT, count], 2)], 1)

    def _windows(self, padded: Tensor) -> Tensor:
        """Returns the patches as a view, [N, C, *space, *kernel]."""
        return windows_of(padded, self.module.kernel_size, self.module.stride, self.module.dilation)

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
            else:
                sides += [0 if conv.padding == "valid" else int(conv.padding[axis])] * 2
        return sides
