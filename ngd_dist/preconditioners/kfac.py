"""K-FAC: the Fisher block of a layer as the Kronecker product of A (inputs) and G (output gradients)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ngd_dist.config import KFAC as KFACConfig
from ngd_dist.factors.cost import LayerShape
from ngd_dist.factors.kronecker import from_basis, mean_diagonal, outer, pi_split, precondition, to_basis
from ngd_dist.inversion import Ending, Problem, Solution, ToInvert, ToInvertRows, error_of
from ngd_dist.layers.base import Rows
from ngd_dist.preconditioners.base import Cache, Preconditioner, Refreshed, with_inverses
from ngd_dist.preconditioners.factors import Factors

__all__ = ["KFAC"]


class KFAC(Preconditioner):
    """A and G as in `Factors`, with the damping shared between them by pi, or exact in their eigenbases.

    Both are inverted when either is new: pi ties them. With pis of different moments the damping of the product would
    be lambda times their ratio, which falls without bound while G vanishes and A stays.
    """

    def __init__(self, shape: LayerShape, config: KFACConfig, max_dense: int) -> None:
        super().__init__(shape)
        self._factors = Factors(shape, config.sharing, max_dense, config.rows)
        self._is_exact = config.damping_form == "exact"
        self.statistics = self._factors.specs
        self.cache_shapes = {spec.name: spec.shape for spec in self.statistics}
        self._roots = [spec.name for spec in self.statistics if spec.is_root]
        if self._roots:
            self.cache_shapes = {**self.cache_shapes, "scale": (shape.blocks, 1, 1)}
        if self._is_exact:
            self.cache_shapes = self._factors.bases | {"inverse": shape.gradient}
        else:
            self.inverses = tuple(self._factors.bases)

    def estimate(self, rows: Rows, due: frozenset[str], shared: Cache) -> dict[str, Tensor]:
        return self._factors.estimate(rows, due)

    def problems(
        self, statistics: Mapping[str, Tensor], fresh: frozenset[str], damping: float, old: Cache | None
    ) -> dict[str, Problem]:
        """Returns both factors if one is new: pi ties them, and the cache stays a function of what is current."""
        if self._is_exact:
            return self._factors.to_decompose(statistics)
        old = old or {}
        return {
            name: ToInvertRows(statistics[name], own)
            if name in self._roots
            else ToInvert(statistics[name], own, old.get(name))
            for name, own in _split(statistics, damping).items()
        }

    def error(self, name: str, statistics: Mapping[str, Tensor], damping: float, old: Cache) -> Tensor | None:
        if self._is_exact or self._roots:
            return None
        return error_of(statistics[name], _split(statistics, damping)[name], old[name])

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
        if not self._roots:
            return with_inverses(old, solutions, self.cache_shapes)
        if any(solution.ending is not Ending.OK for solution in solutions.values()):
            # The scale goes with both inverses: neither is of use without the other.
            return Refreshed(old, {name: solution.ending for name, solution in solutions.items()})
        split = _split(statistics, damping)
        scale = torch.stack([split[name] for name in self._roots]).prod(0).reciprocal().view(-1, 1, 1)
        return with_inverses({**(old or {}), "scale": scale}, solutions, self.cache_shapes)

    def apply(self, cache: Cache, grad_BOI: Tensor) -> Tensor:
        if not self._is_exact:
            direction = precondition(cache["A"], cache["G"], grad_BOI)
            return direction.mul_(cache["scale"]) if self._roots else direction
        A, G = cache.get("A"), cache.get("G")
        return from_basis(A, G, to_basis(A, G, grad_BOI) * cache["inverse"])

    def refresh_flops(self) -> int:
        return self._factors.eigen_flops() if self._is_exact else sum(self._factors.cholesky_flops().values())

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


def _split(statistics: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
    """Returns what is added to each factor, [B]."""
    damping_a, damping_g = pi_split(mean_diagonal(statistics["A"]), mean_diagonal(statistics["G"]), damping)
    return {"A": damping_a, "G": damping_g}
