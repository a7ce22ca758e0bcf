"""TKFAC: Kronecker factors in which each sample counts by the size of its other side, so that the trace is exact."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ngd_dist.config import TKFAC as TKFACConfig
from ngd_dist.factors.cost import LayerShape
from ngd_dist.inversion import Problem, Solution
from ngd_dist.layers.batch import LayerBatch
from ngd_dist.preconditioners.base import Cache, Preconditioner, Refreshed, with_inverses
from ngd_dist.preconditioners.factors import Factors, factor_form, factor_forms
from ngd_dist.statistics.statistic import StatisticSpec

__all__ = ["TKFAC"]

Statistics = Mapping[str, Tensor]


class TKFAC(Preconditioner):
    """Phi = (1/N) sum ||g||^2 a a^T and Psi = (1/N) sum ||a||^2 g g^T over samples and positions; the block is
    Phi (x) Psi / delta, with delta = tr Phi = tr Psi, the mean of ||a||^2 ||g||^2. Source: [G21].

    The statistics are these numerators, since a mean of quotients is not the quotient of the means. If Phi and Psi are
    of different steps, delta is the geometric mean of their traces. Each position counts as a sample, as in K-FAC, or
    positions are reduced first (`sharing`); the source leaves the choice open.

    sqrt(lambda) is added to Phi / sqrt(delta) and to Psi / sqrt(delta), whose traces are sqrt(delta). Both are inverted
    when either is new: delta ties them.
    """

    is_blockwise = True

    def __init__(self, shape: LayerShape, config: TKFACConfig, max_dense: int) -> None:
        super().__init__(shape)
        self._rows = Factors(shape, config.sharing, factor_forms(shape, max_dense))
        self._forms = {
            "Phi": factor_form(shape.blocks, shape.inputs, max_dense),
            "Psi": factor_form(shape.blocks, shape.outputs, max_dense),
        }
        self.statistics = tuple(StatisticSpec(name, form) for name, form in self._forms.items())
        self.entries = {name: form.inverse for name, form in self._forms.items()}

    def estimate(self, batch: LayerBatch, due: frozenset[str], shared: Cache) -> dict[str, Tensor]:
        if not due:
            return {}
        a_BNPI, g_BNPO = self._rows.inputs(batch), self._rows.output_gradients(batch)
        weighted = {"Phi": (a_BNPI, g_BNPO), "Psi": (g_BNPO, a_BNPI)}
        return {
            name: self._forms[name].moment(rows * _lengths(others), 1 / batch.samples, batch.replicate)
            for name, (rows, others) in weighted.items()
            if name in due
        }

    def problems(
        self, statistics: Statistics, fresh: frozenset[str], damping: float, old: Cache | None
    ) -> dict[str, Problem]:
        factors, share = self._factors(statistics), self._damping(statistics, damping)
        return {name: form.problem(factors[name], share, (old or {}).get(name)) for name, form in self._forms.items()}

    def error(self, name: str, statistics: Statistics, damping: float, old: Cache) -> Tensor | None:
        factor, share = self._factors(statistics)[name], self._damping(statistics, damping)
        return self._forms[name].error(factor, share, old[name])

    def refresh(
        self,
        statistics: Statistics,
        fresh: frozenset[str],
        damping: float,
        old: Cache | None,
        solutions: Mapping[str, Solution],
    ) -> Refreshed:
        return with_inverses(old, solutions, self.entries)

    def apply(self, cache: Cache, grad_BOI: Tensor) -> Tensor:
        return self._forms["Psi"].left(cache["Psi"], self._forms["Phi"].right(grad_BOI, cache["Phi"]))

    def refresh_flops(self) -> int:
        return sum(form.inverse_flops for form in self._forms.values())

    def apply_flops(self) -> int:
        entries = self.shape.blocks * self.shape.outputs * self.shape.inputs
        return entries * sum(form.product_flops for form in self._forms.values())

    def _factors(self, statistics: Statistics) -> dict[str, Tensor]:
        """Returns Phi and Psi with the trace sqrt(delta); 0 in a block where delta is 0, as one of them is then."""
        traces = {n: form.mean_eigenvalue(statistics[n]) * form.shape[-1] for n, form in self._forms.items()}
        root = (traces["Phi"].sqrt() * traces["Psi"].sqrt()).sqrt()  # the product of traces may underflow
        return {n: _times(statistics[n], root / trace.where(trace > 0, 1)) for n, trace in traces.items()}

    def _damping(self, statistics: Statistics, damping: float) -> Tensor:
        Phi = statistics["Phi"]
        return torch.full((len(Phi),), damping**0.5, dtype=Phi.dtype, device=Phi.device)


def _lengths(rows_BNPD: Tensor) -> Tensor:
    """Returns the norm of each row, [B, N, P, 1]."""
    return rows_BNPD.square().sum(-1, keepdim=True).sqrt()


def _times(value: Tensor, factor_B: Tensor) -> Tensor:
    return value * factor_B.view(-1, *[1] * (value.ndim - 1))
