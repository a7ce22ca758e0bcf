"""Unit-wise natural gradient: one small Fisher block for each unit's scale and shift, inverted in closed form."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ngd_dist.factors.cost import LayerShape
from ngd_dist.factors.form import Form
from ngd_dist.inversion import Ending, Solution
from ngd_dist.layers.batch import LayerBatch
from ngd_dist.preconditioners.base import Cache, Preconditioner, Refreshed
from ngd_dist.statistics.statistic import StatisticSpec

__all__ = ["UnitWise"]


class UnitWise(Preconditioner):
    """F [O, 3] holds (a, b, d) of the block [[a, b], [b, d]] of each unit; [O, 1] if there is only a scale.

    Rows are the normalised inputs, one per unit: a_BNPI is [1, N, P, O]. Source: [OT20], unit-wise.
    """

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self._has_shift = shape.inputs == 2
        form = Form((shape.outputs, 3 if self._has_shift else 1))
        self.statistics = (StatisticSpec("F", form),)
        self.entries = {"F": form}

    def estimate(self, batch: LayerBatch, due: frozenset[str], shared: Cache) -> dict[str, Tensor]:
        if "F" not in due:
            return {}
        a_NPO, g_NPO = batch.a_BNPI[0], batch.g_BNPO[0]
        scale_NO = (a_NPO * g_NPO).sum(1)
        if not self._has_shift:
            return {"F": scale_NO.square().mean(0).unsqueeze(-1)}
        shift_NO = g_NPO.sum(1)
        blocks = torch.stack([scale_NO.square(), scale_NO * shift_NO, shift_NO.square()], dim=-1)
        return {"F": blocks.mean(0)}

    def refresh(
        self,
        statistics: Mapping[str, Tensor],
        fresh: frozenset[str],
        damping: float,
        old: Cache | None,
        solutions: Mapping[str, Solution],
    ) -> Refreshed:
        F = statistics["F"]
        if self._has_shift:
            a, b, d = F.unbind(-1)
            # (a + damping)(d + damping) - b^2, arranged so that rounding can't make it negative: a d >= b^2 exactly.
            determinant = (a * d - b * b).clamp(min=0) + damping * (a + d) + damping**2
            inverse = torch.stack([d + damping, -b, a + damping], dim=-1) / determinant.unsqueeze(-1)
        else:
            inverse = (F + damping).reciprocal()
        if bool(torch.isfinite(inverse).all()):
            return Refreshed({"F": inverse}, {"F": Ending.OK})
        finite = bool(torch.isfinite(F).all())
        return Refreshed(old, {"F": Ending.NOT_POSITIVE_DEFINITE if finite else Ending.NON_FINITE})

    def apply(self, cache: Cache, grad_BOI: Tensor) -> Tensor:
        if not self._has_shift:
            return cache["F"] * grad_BOI
        a, b, d = cache["F"].unbind(-1)
        scale, shift = grad_BOI.unbind(-1)
        return torch.stack([a * scale + b * shift, b * scale + d * shift], dim=-1)

    def refresh_flops(self) -> int:
        return 8 * self.shape.outputs

    def apply_flops(self) -> int:
        return 6 * self.shape.outputs
