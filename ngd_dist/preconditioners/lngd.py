"""LNGD: each layer's own output as its likelihood, so that the forward pass alone gives the Fisher block."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ngd_dist.config import LNGD as LNGDConfig
from ngd_dist.factors.cost import LayerShape
from ngd_dist.factors.kronecker import mean_diagonal, precondition, second_moment, square_moment
from ngd_dist.inversion import Problem, Solution, ToInvert, error_of
from ngd_dist.layers.base import Rows
from ngd_dist.preconditioners.base import Cache, Preconditioner, Refreshed, with_inverses
from ngd_dist.statistics.statistic import StatisticSpec

__all__ = ["LNGD"]

# Damping of a dense factor, in units of rounding errors of its trace, below which its Cholesky inverse is rounding
# error too. Phi of ResNet-18 at 4 and 32 small images, without full rank: a residual up to 0.09 with 1, 0.012 with 10.
ROUNDING_ERRORS = 10


class LNGD(Preconditioner):
    """Phi = (1/N) sum a a^T ||s'||^2 and diagonal Psi = (1/N) sum ||a||^2 s'^2 over samples and positions.

    s' is the derivative of the activation phi that reads the layer's output s. With phi(s) + N(0, I) for what the
    layer observes, the score of s is s' times noise: its expected square is s'^2, different entries and positions are
    uncorrelated, and no label is drawn. The block is Phi (x) Psi / tr Psi, whose trace is exact; Psi is divided when
    used, not when averaged, because a mean of quotients is not the quotient of the means. Where no activation is known
    s' is 1, and Phi a multiple of K-FAC's A. A Phi wider than `max_dense` is kept as its diagonal. Source: [L24].

    The damping is the method's own, so that `refresh` doesn't read the one that it is given: the mean eigenvalue of
    each factor, between the config's bounds, and not below what the factor's dtype resolves.
    """

    reads_slopes = True

    def __init__(self, shape: LayerShape, config: LNGDConfig, max_dense: int) -> None:
        super().__init__(shape)
        B, I, O = shape.blocks, shape.inputs, shape.outputs  # noqa: E741
        self._is_dense = max_dense >= I
        self._bounds = (config.min_damping, config.max_damping)
        self.statistics = (
            StatisticSpec(
                "Phi", (B, I, I) if self._is_dense else (B, I), is_symmetric=self._is_dense, reads_gradients=False
            ),
            StatisticSpec("Psi", (B, O), reads_gradients=False),
        )
        self.cache_shapes = {spec.name: spec.shape for spec in self.statistics}
        self.inverses = ("Phi",) if self._is_dense else ()
        # Cholesky and the inverse from it: n^3 / 3 + 2 n^3 / 3 multiply-adds, two operations each.
        self.parts = {"Phi": 2 * B * I ** (3 if self._is_dense else 1), "Psi": B * O}

    def estimate(self, rows: Rows, due: frozenset[str], shared: Cache) -> dict[str, Tensor]:
        a_BNPI, slopes_BNPO, weight = rows.a_BNPI, rows.slopes_BNPO, 1 / rows.samples
        found: dict[str, Tensor] = {}
        if "Phi" in due:
            weighted = a_BNPI * slopes_BNPO.square().sum(-1, keepdim=True).sqrt()
            found["Phi"] = (second_moment if self._is_dense else square_moment)(weighted, weight)
        if "Psi" in due:
            lengths = a_BNPI.square().sum(-1, keepdim=True).sqrt()
            found["Psi"] = square_moment(slopes_BNPO * lengths, weight)
        return found

    def problems(
        self, statistics: Mapping[str, Tensor], fresh: frozenset[str], damping: float, old: Cache | None
    ) -> dict[str, Problem]:
        """Returns the factors that are new: nothing ties one to the other."""
        old = old or {}
        factors = {"Phi": statistics["Phi"], "Psi": _with_unit_trace(statistics["Psi"])}
        return {
            name: ToInvert(factor, self._own_damping(factor), old.get(name))
            for name, factor in factors.items()
            if name in fresh or name not in old
        }

    def error(self, name: str, statistics: Mapping[str, Tensor], damping: float, old: Cache) -> Tensor | None:
        factor = statistics[name] if name == "Phi" else _with_unit_trace(statistics[name])
        return error_of(factor, self._own_damping(factor), old[name])

    def refresh(
        self,
        statistics: Mapping[str, Tensor],
        fresh: frozenset[str],
        damping: float,
        old: Cache | None,
        solutions: Mapping[str, Solution],
    ) -> Refreshed:
        return with_inverses(old, solutions, self.cache_shapes)

    def apply(self, cache: Cache, grad_BOI: Tensor) -> Tensor:
        return precondition(cache["Phi"], cache["Psi"], grad_BOI)

    def refresh_flops(self) -> int:
        return sum(self.parts.values())

    def apply_flops(self) -> int:
        entries = self.shape.blocks * self.shape.outputs * self.shape.inputs
        return entries * (2 * self.shape.inputs + 1 if self._is_dense else 2)

    def _own_damping(self, factor: Tensor) -> Tensor:
        mean = mean_diagonal(factor)
        bounded = mean.clamp(*self._bounds)
        if factor.ndim == 2:
            return bounded
        return torch.maximum(bounded, ROUNDING_ERRORS * torch.finfo(factor.dtype).eps * factor.shape[-1] * mean)


def _with_unit_trace(Psi_BO: Tensor) -> Tensor:
    """Returns Psi / tr Psi; as it is where the trace is 0, which is a layer that no sample reaches."""
    trace = Psi_BO.sum(-1, keepdim=True)
    return Psi_BO / trace.where(trace != 0, 1)
