"""nn.Linear: positions are every dimension between the first and the last."""

from torch import Tensor

from ngd_dist.cost import LayerShape
from ngd_dist.layers.base import Layer

__all__ = ["Linear"]


class Linear(Layer):
    """x [N, ..., I] -> y [N, ..., O]. Positions are shared weights in the sense of [E23]."""

    def expected_input(self, x: Tensor) -> str | None:
        return None if x.ndim >= 2 + self.batch_dim else "[samples, ..., inputs]"

    @property
    def shape(self) -> LayerShape:
        outputs, inputs = self._weight.shape
        return LayerShape(self.name, "kronecker", inputs + (self._bias is not None), outputs)

    def inputs(self, kept: Tensor) -> Tensor:
        return self._with_ones(self._rows(kept))

    def output_gradients(self, g: Tensor) -> Tensor:
        return self._rows(g)

    def _rows(self, x: Tensor) -> Tensor:
        x = x.movedim(self.batch_dim, 0)
        return x.reshape(1, x.shape[0], -1, x.shape[-1]).to(self.dtype)
