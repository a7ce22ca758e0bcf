"""One record per covered layer: its module's tensors, its preconditioner, its settings, and its layout on the wire."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ngd_dist.distributed import LayerLayout
from ngd_dist.layers import Layer
from ngd_dist.preconditioners import Preconditioner

__all__ = ["CoveredLayer", "CoveredLayers"]


@dataclass(eq=False, slots=True)
class CoveredLayer:
    """A layer that is preconditioned.

    group: the param group of the layer's weight. Its lr and damping may change between steps, and another dictionary
    may take its place in the optimizer, as after `load_state_dict`: each step begins by looking it up.
    """

    layer: Layer
    method: Preconditioner
    group: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of the module in the model."""
        return self.layer.name

    @property
    def lr(self) -> float:
        """The learning rate of the layer's param group at this moment."""
        return float(self.group["lr"])

    @property
    def damping(self) -> float:
        """The damping of the layer's param group at this moment."""
        return float(self.group["damping"])

    @property
    def layout(self) -> LayerLayout:
        """The tensors of the layer that may travel between ranks."""
        method, layer = self.method, self.layer
        return LayerLayout(layer.shape.gradient, method.statistics, method.entries, layer.dtype, method.shared)


CoveredLayers = Mapping[str, CoveredLayer]
"""By name, in the order in which the model registers them."""
