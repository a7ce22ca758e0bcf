"""K-FAC: the Fisher block of a layer as the Kronecker product of A (inputs) and G (output gradients)."""

from collections.abc import Mapping

from torch import Tensor

from ngd_dist.config import KFAC as KFACConfig
from ngd_dist.cost import LayerShape
from ngd_dist.damping import pi_split
from ngd_dist.inversion import Problem, Solution, ToInvert
from ngd_dist.kronecker import from_basis, mean_diagonal, outer, precondition, to_basis
from ngd_dist.layers.base import Rows
from ngd_dist.preconditioners.base import Cache, Preconditioner, Refreshed, with_inverses
from ngd_dist.preconditioners.factors import Factors

__all__ = ["KFAC"]


class KFAC(Preconditioner):
    """A and G as in `Factors`, with the damping shared between them by pi, or exact in their eigenbases."""

    def __init__(self, shape: LayerShape, config: KFACConfig, max_dense: int) -> None:
        super().__init__(shape)
        self._factors = Factors(shape, config.sharing, max_dense)
        self._is_exact = config.damping_form == "exact"
        self.statistics = self._factors.specs
        self.cache_shapes = {spec.name: spec.shape for spec in self.statistics}
        if self._is_exact:
            self.cache_shapes = self._factors.bases | {"inverse": shape.gradient}

    def estimate(self, rows: Rows, due: frozenset[str], shared: Cache) -> dict[str, Tensor]:
        return self._factors.estimate(rows, due)

    def problems(
        self, statistics: Mapping[str, Tensor], fresh: frozenset[str], damping: float, old: Cache | None
    ) -> dict[str, Problem]:
        """Returns both factors if one is new: pi ties them, and the cache stays a function of what is current."""
        if self._is_exact:
            return self._factors.to_decompose(statistics)
        A, G = statistics["A"], statistics["G"]
        damping_a, damping_g = pi_split(mean_diagonal(A), mean_diagonal(G), damping)
        old = old or {}
        return {"A": ToInvert(A, damping_a, old.get("A")), "G": ToInvert(G, damping_g, old.get("G"))}

    def refresh(
        self,
        statistics: Mapping[str, Tensor],
        fresh: frozenset[str],
        damping: float,
        old: Cache | None,
        solutions: Mapping[str, Solution],
    ) -> Refreshed:
        if self._is_exact:
            return self._refresh_exact(statistics, damping, old, solutions)
        return with_inverses(old, solutions, self.cache_shapes)

    def apply(self, cache: Cache, grad_BOI: Tensor) -> Tensor:
        if not self._is_exact:
            return precondition(cache["A"], cache["G"], grad_BOI)
        A, G = cache.get("A"), cache.get("G")
        return from_basis(A, G, to_basis(A, G, grad_BOI) * cache["inverse"])

    def refresh_flops(self) -> int:
        return self._factors.eigen_flops() if self._is_exact else self._factors.cholesky_flops()

    def apply_flops(self) -> int:
        return self._factors.product_flops() * (2 if self._is_exact else 1)

    def _refresh_exact(
        self, statistics: Mapping[str, Tensor], damping: float, old: Cache | None, solutions: Mapping[str, Solution]
    ) -> Refreshed:
        """Returns bases and 1 / (d_G d_A^T + damping): the old ones unless both factors gave theirs."""
        found = self._factors.decomposition(statistics, solutions)
        if found.values is None or found.bases is None:
            return Refreshed(old, found.endings)
        inverse = (outer(found.values["G"], found.values["A"]) + damping).reciprocal()
        return Refreshed({**found.bases, "inverse": inverse}, found.endings)
