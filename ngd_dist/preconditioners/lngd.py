"""LNGD: the likelihood of each layer is its own output, so that the forward pass alone gives the Fisher block."""

from collections.abc import Mapping

from torch import Tensor

from ngd_dist.config import LNGD as LNGDConfig
from ngd_dist.factors.cost import LayerShape
from ngd_dist.factors.diagonal import Diagonal
from ngd_dist.factors.form import FactorForm
from ngd_dist.inversion import Problem, Solution
from ngd_dist.layers.batch import LayerBatch
from ngd_dist.preconditioners.base import Cache, Preconditioner, Refreshed, with_inverses
from ngd_dist.preconditioners.factors import factor_form
from ngd_dist.statistics.statistic import StatisticSpec

__all__ = ["LNGD"]


class LNGD(Preconditioner):
    """Phi = (1/N) sum a a^T ||s'||^2 and diagonal Psi = (1/N) sum ||a||^2 s'^2 over samples and positions.

    s' is the derivative of the activation phi that reads the layer's output s. If the layer observes phi(s) + N(0, I),
    the score of s is s' times noise: its expected square is s'^2, different entries and positions are uncorrelated, and
    no label is drawn. The block is Phi (x) Psi / tr Psi, with the exact trace; Psi is divided when used, not when
    averaged, because a mean of quotients is not the quotient of the means. If no activation is known, s' is 1, and Phi
    a multiple of K-FAC's A. A Phi wider than `max_dense` is kept as its diagonal. Source: [L24].

    The damping is the method's own, and `refresh` ignores its argument: the mean eigenvalue of each factor, between the
    config's bounds, and not below the resolution of the factor's form and dtype.
    """

    reads_slopes = True

    def __init__(self, shape: LayerShape, config: LNGDConfig, max_dense: int) -> None:
        super().__init__(shape)
        B, I, O = shape.blocks, shape.inputs, shape.outputs  # noqa: E741
        self._bounds = (config.min_damping, config.max_damping)
        self._forms: dict[str, FactorForm] = {"Phi": factor_form(B, I, max_dense), "Psi": Diagonal((B, O))}
        self.statistics = tuple(StatisticSpec(name, form, reads_gradients=False) for name, form in self._forms.items())
        self.entries = {name: form.inverse for name, form in self._forms.items()}
        self.flops_by_statistic = {"Phi": self._forms["Phi"].inverse_flops, "Psi": B * O}

    def estimate(self, batch: LayerBatch, due: frozenset[str], shared: Cache) -> dict[str, Tensor]:
        a_BNPI, slopes_BNPO, weight = batch.a_BNPI, batch.slopes_BNPO, 1 / batch.samples
        statistics: dict[str, Tensor] = {}
        if "Phi" in due:
            weighted = a_BNPI * slopes_BNPO.square().sum(-1, keepdim=True).sqrt()
            statistics["Phi"] = self._forms["Phi"].moment(weighted, weight, batch.replicate)
        if "Psi" in due:
            lengths = a_BNPI.square().sum(-1, keepdim=True).sqrt()
            statistics["Psi"] = self._forms["Psi"].moment(slopes_BNPO * lengths, weight, batch.replicate)
        return statistics

    def problems(
        self, statistics: Mapping[str, Tensor], fresh: frozenset[str], damping: float, old: Cache | None
    ) -> dict[str, Problem]:
        """Returns the factors that are new: nothing ties one to the other."""
        old = old or {}
        factors = {"Phi": statistics["Phi"], "Psi": _with_unit_trace(statistics["Psi"])}
        return {
            name: self._forms[name].problem(factor, self._own_damping(name, factor), old.get(name))
            for name, factor in factors.items()
            if name in fresh or name not in old
        }

    def error(self, name: str, statistics: Mapping[str, Tensor], damping: float, old: Cache) -> Tensor | None:
        factor = statistics[name] if name == "Phi" else _with_unit_trace(statistics[name])
        return self._forms[name].error(factor, self._own_damping(name, factor), old[name])

    def refresh(
        self,
        statistics: Mapping[str, Tensor],
        fresh: frozenset[str],
        damping: float,
        old: Cache | None,
        solutions: Mapping[str, Solution],
    ) -> Refreshed:
        return with_inverses(old, solutions, self.entries)

    def apply(self, cache: Cache, grad_BOI: Tensor) -> Tensor:
        return self._forms["Psi"].left(cache["Psi"], self._forms["Phi"].right(grad_BOI, cache["Phi"]))

    def refresh_flops(self) -> int:
        return sum(self.flops_by_statistic.values())

    def apply_flops(self) -> int:
        entries = self.shape.blocks * self.shape.outputs * self.shape.inputs
        return entries * sum(form.product_flops for form in self._forms.values())

    def _own_damping(self, name: str, factor: Tensor) -> Tensor:
        mean = self._forms[name].mean_eigenvalue(factor)
        return self._forms[name].resolved(mean.clamp(*self._bounds), mean)


def _with_unit_trace(Psi_BO: Tensor) -> Tensor:
    """Returns Psi / tr Psi; if the trace is 0, as in a layer that no sample reaches, Psi itself."""
    trace = Psi_BO.sum(-1, keepdim=True)
    return Psi_BO / trace.where(trace != 0, 1)
