"""Module kinds: each turns one module's tensors into rows and a gradient matrix, and back. Start at `base.Layer`.

A new kind is one file and one line here. The match is on the exact type: a subclass may compute something else.
"""

from torch import nn

from ngd_dist.layers.base import Layer, Rows
from ngd_dist.layers.batchnorm import BatchNorm
from ngd_dist.layers.conv import Conv
from ngd_dist.layers.linear import Linear

__all__ = ["LAYERS", "Layer", "Rows"]

LAYERS: dict[type[nn.Module], type[Layer]] = {
    nn.Linear: Linear,
    nn.Conv2d: Conv,
    nn.BatchNorm2d: BatchNorm,
}
