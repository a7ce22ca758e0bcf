"""nn.Linear, and transformers' Conv1D: positions are every dimension between the first and the last."""

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from ngd_dist.factors.cost import LayerShape
from ngd_dist.layers.base import Layer
from ngd_dist.layers.run import of_samples

__all__ = ["Linear", "TransposedLinear"]


class Linear(Layer):
    """x [N, ..., I] -> y [N, ..., O]. Positions are shared weights in the sense of [E23]."""

    is_stackable = True

    def expected_input(self, x: Tensor) -> str | None:
        return None if x.ndim >= 2 + self.batch_dim else "[samples, ..., inputs]"

    @cached_property
    def shape(self) -> LayerShape:
        outputs, inputs = self.shapes[0]
        return LayerShape(self.name, "kronecker", inputs + (self._bias is not None), outputs)

    def inputs(self, kept: Tensor) -> Tensor:
        return self._with_ones(self._rows(kept))

    def some_samples(self, kept: Tensor, part: range, samples: int) -> Tensor:
        return of_samples(kept, part, samples, self.batch_dim)

    def output_gradients(self, kept: Tensor, g: Tensor) -> Tensor:
        return self._rows(g)

    def _rows(self, x: Tensor) -> Tensor:
        x = x.movedim(self.batch_dim, 0)
        return x.reshape(1, x.shape[0], -1, x.shape[-1]).to(self.dtype)


class TransposedLinear(Linear):
    """A linear layer with a weight [I, O], and always a bias."""

    @cached_property
    def shape(self) -> LayerShape:
        inputs, outputs = self.shapes[0]
        return LayerShape(self.name, "kronecker", inputs + 1, outputs)

    def join(self, gradients: Sequence[Tensor]) -> Tensor:
        weight, bias = gradients
        return super().join([weight.mT, bias])

    def split(self, direction_BOI: Tensor) -> list[Tensor]:
        direction_OI = direction_BOI.squeeze(-3)
        return [direction_OI[..., :-1].mT.contiguous(), direction_OI[..., -1].contiguous()]
