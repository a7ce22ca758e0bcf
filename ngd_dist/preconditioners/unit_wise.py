"""Unit-wise natural gradient: a 2x2 Fisher block for each channel's scale and shift, inverted in closed form."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ngd_dist.cost import LayerShape
from ngd_dist.inversion import Ending
from ngd_dist.layers.base import Rows
from ngd_dist.preconditioners.base import Cache, Preconditioner, Refreshed
from ngd_dist.statistics import StatisticSpec

__all__ = ["UnitWise"]


class UnitWise(Preconditioner):
    """F [O, 3] holds (a, b, d) of the block [[a, b], [b, d]] of each unit. Source: [OT20], unit-wise."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.statistics = (StatisticSpec("F", (shape.outputs, 3), is_symmetric=False),)

    def estimate(self, rows: Rows, due: frozenset[str]) -> dict[str, Tensor]:
        a_NPO, g_NPO = rows.a_NPI, rows.g_NPO
        scale_NO, shift_NO = (a_NPO * g_NPO).sum(1), g_NPO.sum(1)
        blocks = torch.stack([scale_NO.square(), scale_NO * shift_NO, shift_NO.square()], dim=-1)
        return {"F": blocks.mean(0)}

    def refresh(self, statistics: Mapping[str, Tensor], damping: float, old: Cache | None) -> Refreshed:
        a, b, d = statistics["F"].unbind(-1)
        # (a + damping)(d + damping) - b^2, arranged so that rounding can't make it negative: a d >= b^2 in exact terms.
        determinant = (a * d - b * b).clamp(min=0) + damping * (a + d) + damping**2
        inverse = torch.stack([d + damping, -b, a + damping], dim=-1) / determinant.unsqueeze(-1)
        if bool(torch.isfinite(inverse).all()):
            return Refreshed({"F": inverse}, {"F": Ending.OK})
        finite = bool(torch.isfinite(statistics["F"]).all())
        return Refreshed(old, {"F": Ending.NOT_POSITIVE_DEFINITE if finite else Ending.NON_FINITE})

    def apply(self, cache: Cache, grad_OI: Tensor) -> Tensor:
        a, b, d = cache["F"].unbind(-1)
        scale, shift = grad_OI.unbind(-1)
        return torch.stack([a * scale + b * shift, b * scale + d * shift], dim=-1)

    def refresh_flops(self) -> int:
        return 8 * self.shape.outputs
