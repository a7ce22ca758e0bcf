"""nn.Embedding: a linear layer without bias whose input rows are one-hot, and never made."""

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist.factors.cost import LayerShape
from ngd_dist.layers.base import Layer
from ngd_dist.layers.run import of_samples

__all__ = ["Embedding"]


class Embedding(Layer):
    """Indices x [N, ...] -> y [N, ..., O]; I is the number of indices, positions are all dimensions after N.

    If x is `padding_idx`, the weight gets no gradient: such positions don't count.
    """

    module: nn.Embedding

    @classmethod
    def uncovered(cls, module: nn.Module) -> str | None:
        assert isinstance(module, nn.Embedding)
        settings = {
            "sparse=True": module.sparse,
            "max_norm: its forward pass changes the weights": module.max_norm is not None,
            "scale_grad_by_freq: its gradient is not that of the loss": module.scale_grad_by_freq,
        }
        return next((f"Embedding with {setting}" for setting, is_set in settings.items() if is_set), None)

    def expected_input(self, x: Tensor) -> str | None:
        return None if x.ndim > self.batch_dim else "[samples, ...]"

    @cached_property
    def shape(self) -> LayerShape:
        inputs, outputs = self.shapes[0]
        return LayerShape(self.name, "kronecker", inputs, outputs, has_one_hot_inputs=True)

    def inputs(self, kept: Tensor) -> Tensor:
        kept = kept.movedim(self.batch_dim, 0)
        return kept.reshape(1, kept.shape[0], -1, 1).long()

    def some_samples(self, kept: Tensor, part: range, samples: int) -> Tensor:
        return of_samples(kept, part, samples, self.batch_dim)

    def output_gradients(self, kept: Tensor, g: Tensor) -> Tensor:
        g = g.movedim(self.batch_dim, 0)
        rows = g.reshape(1, g.shape[0], -1, g.shape[-1]).to(self.dtype)
        padding = self.module.padding_idx
        return rows if padding is None else rows * (self.inputs(kept) != padding)

    def positions(self, kept: Tensor, g_BNPO: Tensor) -> tuple[float, ...]:
        padding = self.module.padding_idx
        if padding is None:
            return super().positions(kept, g_BNPO)
        # One host read, if G is due. At least 1 in all, so that a batch of padding alone divides 0 by 1.
        return (max(1, int((kept != padding).sum())) / g_BNPO.shape[1],)

    def input_squares(self, a_BNPI: Tensor, counted_BNP: Tensor | None) -> Tensor:
        """Returns the count of each index, [1, I]."""
        counts = torch.zeros(self.shapes[0][0], dtype=self.dtype, device=a_BNPI.device)
        indices = a_BNPI.flatten()
        ones = counts.new_ones(()).expand(indices.shape[0])
        counts.index_add_(0, indices, ones if counted_BNP is None else counted_BNP.flatten().to(counts))
        if self.module.padding_idx is not None:
            counts[self.module.padding_idx] = 0
        return counts.unsqueeze(0)

    def along(self, a_BNPI: Tensor, g_BNPO: Tensor, direction_BOI: Tensor) -> Tensor:
        columns_NPO = F.embedding(a_BNPI[0, ..., 0], direction_BOI[0].mT)
        return (columns_NPO * g_BNPO[0]).sum((1, 2))

    def join(self, gradients: Sequence[Tensor]) -> Tensor:
        return gradients[0].mT.unsqueeze(0).to(self.dtype)

    def split(self, direction_BOI: Tensor) -> list[Tensor]:
        return [direction_BOI[0].mT.contiguous()]
