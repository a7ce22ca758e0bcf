"""nn.Linear: positions are every dimension between the first and the last."""

from torch import Tensor

from ngd_dist.cost import LayerShape
from ngd_dist.layers.base import Layer

__all__ = ["Linear"]


class Linear(Layer):
    """x [N, ..., I] -> y [N, ..., O]. Positions are shared weights in the `expand` sense ([E23])."""

    @classmethod
    def expected_input(cls, x: Tensor) -> str | None:
        return None if x.ndim >= 2 else "[samples, ..., inputs]"

    @property
    def shape(self) -> LayerShape:
        outputs, inputs = self._weight.shape
        return LayerShape(self.name, "kronecker", inputs + (self._bias is not None), outputs)

    def inputs(self, x: Tensor) -> Tensor:
        return self._with_ones(x.reshape(x.shape[0], -1, x.shape[-1]).to(self.dtype))

    def output_gradients(self, g: Tensor) -> Tensor:
        return g.reshape(g.shape[0], -1, g.shape[-1]).to(self.dtype)
