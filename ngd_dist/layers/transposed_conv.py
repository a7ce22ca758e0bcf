"""nn.ConvTranspose1d, 2d and 3d: positions are the input's pixels, outputs the patch that each of them adds to.

The bias reaches outputs that no weight does, and those of a pixel several times or never: it is a layer of its own. Its
gradient is a sum over pixels, so that one row of a sample, with a = 1, tells it exactly.
"""

from collections.abc import Sequence
from functools import cached_property
from math import prod

import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist.factors.cost import LayerShape
from ngd_dist.layers.base import Layer
from ngd_dist.layers.patches import image_of, patch_rows, windows_of
from ngd_dist.layers.run import of_samples

__all__ = ["ChannelBias", "TransposedConv"]

Module = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class TransposedConv(Layer):
    """The weight [C, O, *kernel] of x [N, C, *space] -> y [N, O, *space'], with stride, padding, dilation and groups.

    Each group is a block. g has the patch of the output's gradient that an input pixel reads in backward: O times the
    numbers of the kernel.
    """

    module: Module
    is_stackable = True

    @classmethod
    def split_module(cls, name: str, module: nn.Module, *, batch_dim: int = 0) -> list[Layer]:
        weight = cls(name, module)  # torch's convolutions count samples in dimension 0
        if module.bias is None:
            return [weight]
        return [weight, ChannelBias(f"{name}.bias" if name else "bias", module)]

    def expected_input(self, x: Tensor) -> str | None:
        return image_of(len(self.module.kernel_size), x)

    @cached_property
    def shape(self) -> LayerShape:
        (inputs, *patch), groups = self.shapes[0], self.module.groups
        return LayerShape(self.name, "kronecker", inputs // groups, prod(patch), blocks=groups)

    def inputs(self, kept: Tensor) -> Tensor:
        x_NBIP: Tensor = kept.flatten(2).unflatten(1, (self.module.groups, -1))
        return x_NBIP.permute(1, 0, 3, 2).to(self.dtype)

    def some_samples(self, kept: Tensor, part: range, samples: int) -> Tensor:
        return of_samples(kept, part, samples)

    def output_gradients(self, kept: Tensor, g: Tensor) -> Tensor:
        conv = self.module
        # F.pad counts from the last dimension.
        sides = [int(conv.padding[axis]) for axis in reversed(range(len(conv.kernel_size))) for _ in ("left", "right")]
        windows = windows_of(F.pad(g.to(self.dtype), sides), conv.kernel_size, conv.stride, conv.dilation)
        for axis in range(2, kept.ndim):
            # An output padding of a stride or more leaves room for pixels that the input has not.
            windows = windows.narrow(axis, 0, kept.shape[axis])
        return patch_rows(windows, conv.groups)

    def rows(self, kept: Tensor, g: Tensor) -> int:
        return kept.numel() // kept.shape[1]

    def join(self, gradients: Sequence[Tensor]) -> Tensor:
        (weight,) = gradients
        blocks, outputs, inputs = self.shape.gradient
        layers = weight.shape[: weight.ndim - len(self.shapes[0])]
        return weight.reshape(*layers, blocks, inputs, outputs).mT.to(self.dtype)

    def split(self, direction_BOI: Tensor) -> list[Tensor]:
        layers = direction_BOI.shape[:-3]
        return [direction_BOI.mT.reshape(*layers, *self.shapes[0])]

    def _own_parameters(self) -> list[nn.Parameter]:
        return [self._weight]


class ChannelBias(Layer):
    """The bias of the outputs' channels: the input is 1."""

    module: Module
    is_stackable = True

    def expected_input(self, x: Tensor) -> str | None:
        return image_of(len(self.module.kernel_size), x)

    @cached_property
    def shape(self) -> LayerShape:
        return LayerShape(self.name, "kronecker", 1, self.shapes[0].numel())

    def keep(self, x: Tensor, output: Tensor) -> Tensor:
        return x.new_ones(len(x), 1)

    def inputs(self, kept: Tensor) -> Tensor:
        return kept.view(1, -1, 1, 1).to(self.dtype)

    def some_samples(self, kept: Tensor, part: range, samples: int) -> Tensor:
        return of_samples(kept, part, samples)

    def output_gradients(self, kept: Tensor, g: Tensor) -> Tensor:
        return g.to(self.dtype).flatten(2).sum(2).view(1, len(g), 1, -1)

    def rows(self, kept: Tensor, g: Tensor) -> int:
        return len(kept)

    def _own_parameters(self) -> list[nn.Parameter]:
        assert self._bias is not None
        return [self._bias]
