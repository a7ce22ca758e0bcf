"""Eva: the mean input and the mean output gradient make a Fisher block of rank one, whose inverse is a formula."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ngd_dist.config import Eva as EvaConfig
from ngd_dist.factors.cost import LayerShape
from ngd_dist.factors.form import Form
from ngd_dist.factors.kronecker import first_moment
from ngd_dist.inversion import Ending, Solution
from ngd_dist.layers.batch import LayerBatch
from ngd_dist.preconditioners.base import Cache, Preconditioner, Refreshed
from ngd_dist.preconditioners.factors import Factors, factor_forms
from ngd_dist.statistics.statistic import StatisticSpec

__all__ = ["Eva"]


class Eva(Preconditioner):
    """The block is (a a^T) (x) (g g^T) + lambda I, with vectors a and g, and its inverse that of Sherman and Morrison:

        direction = (grad - (g^T grad a) / (lambda + ||a||^2 ||g||^2) g a^T) / lambda

    a and g are means over samples; a a^T takes the place of K-FAC's A and g g^T that of its G. With P positions A is a
    sum over them and G a mean: a is then sqrt(P) times the mean over positions, g the mean. If positions are reduced,
    a is averaged and g summed over them. The source takes both means alone, which is the same for P = 1; it has a mean
    over samples of the gradients of the mean loss, where g here is that of a sample's own loss. Source: [Z23].
    """

    is_blockwise = True

    def __init__(self, shape: LayerShape, config: EvaConfig, max_dense: int) -> None:
        super().__init__(shape)
        B, I, O = shape.blocks, shape.inputs, shape.outputs  # noqa: E741
        self._rows = Factors(shape, config.sharing, factor_forms(shape, max_dense))
        self._expands = not self._rows.sums_positions
        vectors = {"a": Form((B, I)), "g": Form((B, O))}
        self.statistics = (
            StatisticSpec("a", vectors["a"], reads_gradients=False, per_position=0.5 * self._expands),
            StatisticSpec("g", vectors["g"], per_position=self._expands, moment=1),
        )
        self.entries = {**vectors, "damping": Form((B,))}
        self.flops_by_statistic = {name: 2 * form.numbers for name, form in vectors.items()}

    def estimate(self, batch: LayerBatch, due: frozenset[str], shared: Cache) -> dict[str, Tensor]:
        rows = {"a": self._rows.inputs, "g": self._rows.output_gradients}
        return {
            spec.name: first_moment(rows[spec.name](batch), self._weight(spec, batch))
            for spec in self.statistics
            if spec.name in due
        }

    def refresh(
        self,
        statistics: Mapping[str, Tensor],
        fresh: frozenset[str],
        damping: float,
        old: Cache | None,
        solutions: Mapping[str, Solution],
    ) -> Refreshed:
        old = old or {}
        names = [name for name in self.flops_by_statistic if name in fresh or name not in old]
        are_finite = torch.stack([torch.isfinite(statistics[name]).all() for name in names]).tolist() if names else []
        endings = {n: Ending.OK if ok else Ending.NON_FINITE for n, ok in zip(names, are_finite, strict=True)}
        cache = {**old, **{name: statistics[name] for name in names if endings[name] is Ending.OK}}
        if not cache.keys() >= self.flops_by_statistic.keys():
            return Refreshed(None, endings)
        return Refreshed({**cache, "damping": cache["a"].new_full((self.shape.blocks,), damping)}, endings)

    def apply(self, cache: Cache, grad_BOI: Tensor) -> Tensor:
        a_BI1, g_BO1, damping = cache["a"].unsqueeze(-1), cache["g"].unsqueeze(-1), cache["damping"].view(-1, 1, 1)
        along = g_BO1.mT @ grad_BOI @ a_BI1
        share = along / (damping + a_BI1.mT @ a_BI1 * (g_BO1.mT @ g_BO1))
        return torch.baddbmm(grad_BOI, g_BO1 * -share, a_BI1.mT) / damping

    def refresh_flops(self) -> int:
        return sum(self.flops_by_statistic.values())

    def apply_flops(self) -> int:
        return 5 * self.shape.blocks * self.shape.outputs * self.shape.inputs

    def _weight(self, spec: StatisticSpec, batch: LayerBatch) -> float | Tensor:
        """Returns 1 / N, over the power of the positions that the statistic has."""
        # The rows of a run that all samples share are scaled for the mean of their squares: see `LayerBatch.sharers`.
        samples = batch.samples * batch.sharers**0.5 if spec.reads_gradients else batch.samples
        return 1 / (batch.mean_positions_B**spec.per_position * samples) if spec.per_position else 1 / samples
