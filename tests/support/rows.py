"""Rows of one layer as plain tensors, for tests of what is estimated from them."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from ngd_dist.layers import LayerBatch, Replicate


@dataclass
class GivenRows:
    """Stands in for `ngd_dist.layers.LayerBatch`."""

    a_BNPI: Tensor  # noqa: N815
    g_BNPO: Tensor  # noqa: N815
    slopes_BNPO: Tensor  # noqa: N815
    replicate: Replicate = field(default_factory=Replicate)
    sharers: int = 1

    @property
    def samples(self) -> int:
        return self.a_BNPI.shape[1]

    @cached_property
    def positions_B(self) -> Tensor:
        return torch.tensor([float(self.a_BNPI.shape[2])], dtype=torch.float64)

    @property
    def mean_positions_B(self) -> Tensor:
        return self.positions_B

    @property
    def input_squares_BI(self) -> Tensor:
        return self.a_BNPI.square().sum((1, 2))

    @property
    def input_moment_BII(self) -> Tensor:
        return torch.einsum("bnpi,bnpj->bij", self.a_BNPI, self.a_BNPI)


class ForwardRows(GivenRows):
    """Rows of which nobody may ask for the output gradients."""

    def __getattribute__(self, name: str) -> object:
        assert name != "g_BNPO", "the forward pass alone was to be read"
        return super().__getattribute__(name)


def random_rows(
    shape: tuple[int, int, int], *, samples: int, positions: int, seed: int = 0, kind: type[GivenRows] = GivenRows
) -> LayerBatch:
    """Returns float64 rows for a gradient of shape [B, O, I], of which a and g of a sample are correlated."""
    B, O, I = shape  # noqa: E741
    generator = torch.Generator().manual_seed(seed)

    def draw(width: int) -> Tensor:
        return torch.randn(B, samples, positions, width, dtype=torch.float64, generator=generator)

    length = draw(1).exp()  # heavy tails, the same of a and g: what makes A (x) G a poor Fisher block
    return cast(LayerBatch, kind(draw(I) * length, draw(O) * length, draw(O).abs()))
