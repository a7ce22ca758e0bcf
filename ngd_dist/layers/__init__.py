"""Module kinds: each turns one module's tensors into rows and a gradient matrix, and back. Start at `base.Layer`.

A new kind is one file and one line here. The match is on the exact type: a subclass may compute something else.
"""

from torch import nn

from ngd_dist.layers.base import Layer, OnRun, Rows, Run
from ngd_dist.layers.batchnorm import BatchNorm
from ngd_dist.layers.conv import Conv
from ngd_dist.layers.linear import Linear

__all__ = ["LAYERS", "Layer", "OnRun", "Rows", "Run", "kind_of"]

LAYERS: dict[type[nn.Module], type[Layer]] = {
    nn.Linear: Linear,
    nn.Conv2d: Conv,
    nn.BatchNorm2d: BatchNorm,
}

# Module kinds of other libraries, by dotted name: none of them is imported here.
LAYERS_BY_NAME: dict[str, type[Layer]] = {}


def kind_of(module: nn.Module) -> type[Layer] | None:
    """Returns the kind that covers modules of this very type, or None."""
    own = type(module)
    return LAYERS.get(own) or LAYERS_BY_NAME.get(f"{own.__module__}.{own.__qualname__}")
