"""K-FAC: the Fisher block of a layer as the Kronecker product of A (inputs) and G (output gradients)."""

from collections.abc import Mapping

from torch import Tensor

from ngd_dist.config import KFAC as KFACConfig
from ngd_dist.cost import LayerShape
from ngd_dist.damping import pi_split
from ngd_dist.inversion import Ending, eigen, invert, invert_diagonal
from ngd_dist.kronecker import (
    from_basis,
    mean_diagonal,
    outer,
    precondition,
    second_moment,
    square_moment,
    to_basis,
)
from ngd_dist.layers.base import Rows
from ngd_dist.preconditioners.base import Cache, Preconditioner, Refreshed
from ngd_dist.statistics import StatisticSpec

__all__ = ["KFAC"]


class KFAC(Preconditioner):
    """A = (1/N) sum a a^T over samples and positions, G = (1/(N P)) sum g g^T. Sources: [MG15], [GM16] for P > 1.

    With `sharing="reduce"` a is averaged and g summed over positions before, and P is 1. Source: [E23]. A factor wider
    than `max_dense` is kept as its diagonal, and so is the A of one-hot inputs, for which that is exact.
    """

    def __init__(self, shape: LayerShape, config: KFACConfig, max_dense: int) -> None:
        super().__init__(shape)
        B, I, O = shape.blocks, shape.inputs, shape.outputs  # noqa: E741
        dense_a, dense_g = max_dense >= I and not shape.has_one_hot_inputs, max_dense >= O
        self._reduces = config.sharing == "reduce" and not shape.has_one_hot_inputs
        self._is_exact = config.damping_form == "exact"
        self.statistics = (
            StatisticSpec("A", (B, I, I) if dense_a else (B, I), is_symmetric=dense_a, reads_gradients=False),
            StatisticSpec("G", (B, O, O) if dense_g else (B, O), is_symmetric=dense_g),
        )
        self.cache_shapes = {spec.name: spec.shape for spec in self.statistics}
        if self._is_exact:
            bases = {spec.name: spec.shape for spec in self.statistics if spec.is_symmetric}
            self.cache_shapes = bases | {"inverse": shape.gradient}

    def estimate(self, rows: Rows, due: frozenset[str], shared: Cache) -> dict[str, Tensor]:
        A, G = self.statistics
        found: dict[str, Tensor] = {}
        if "A" in due and self.shape.has_one_hot_inputs:
            found["A"] = rows.input_squares_BI / rows.samples
        elif "A" in due:
            a_BNPI, weight_a = rows.a_BNPI, 1 / rows.samples
            if self._reduces:
                a_BNPI = a_BNPI.sum(2, keepdim=True) / rows.positions_B.to(a_BNPI).view(-1, 1, 1, 1)
            found["A"] = second_moment(a_BNPI, weight_a) if A.is_symmetric else square_moment(a_BNPI, weight_a)
        if "G" in due:
            g_BNPO = rows.g_BNPO.sum(2, keepdim=True) if self._reduces else rows.g_BNPO
            weight = 1 / rows.samples if self._reduces else 1 / (rows.samples * rows.positions_B)
            found["G"] = second_moment(g_BNPO, weight) if G.is_symmetric else square_moment(g_BNPO, weight)
        return found

    def refresh(
        self, statistics: Mapping[str, Tensor], fresh: frozenset[str], damping: float, old: Cache | None
    ) -> Refreshed:
        """Rebuilds both factors if one is new: pi ties them, and the cache stays a function of what is current."""
        if self._is_exact:
            return self._refresh_exact(statistics, damping, old)
        A, G = statistics["A"], statistics["G"]
        damping_a, damping_g = pi_split(mean_diagonal(A), mean_diagonal(G), damping)
        inverses = {
            name: (invert if factor.ndim == 3 else invert_diagonal)(factor, own)
            for name, factor, own in (("A", A, damping_a), ("G", G, damping_g))
        }
        endings: dict[str, Ending] = {name: inverse.ending for name, inverse in inverses.items()}
        cache: Cache = dict(old or {})
        cache |= {name: inverse.value for name, inverse in inverses.items() if inverse.value is not None}
        return Refreshed(cache if cache.keys() == inverses.keys() else None, endings)

    def apply(self, cache: Cache, grad_BOI: Tensor) -> Tensor:
        if not self._is_exact:
            return precondition(cache["A"], cache["G"], grad_BOI)
        A, G = cache.get("A"), cache.get("G")
        return from_basis(A, G, to_basis(A, G, grad_BOI) * cache["inverse"])

    def refresh_flops(self) -> int:
        # Cholesky and the inverse from it: n^3 / 3 + 2 n^3 / 3 multiply-adds, two operations each. The QR iterations
        # of an eigendecomposition come to some 9 n^3 (Golub and Van Loan, 8.3).
        each = 9 if self._is_exact else 2
        return sum(each * spec.shape[0] * spec.shape[-1] ** (3 if spec.is_symmetric else 1) for spec in self.statistics)

    def apply_flops(self) -> int:
        entries = self.shape.blocks * self.shape.outputs * self.shape.inputs
        products = sum(2 * spec.shape[-1] if spec.is_symmetric else 1 for spec in self.statistics)
        return entries * products * (2 if self._is_exact else 1)

    def _refresh_exact(self, statistics: Mapping[str, Tensor], damping: float, old: Cache | None) -> Refreshed:
        """Returns bases and 1 / (d_G d_A^T + damping): the old ones unless both factors gave theirs."""
        values: dict[str, Tensor] = {}
        cache: Cache = {}
        endings: dict[str, Ending] = {}
        for spec in self.statistics:
            if not spec.is_symmetric:
                values[spec.name], endings[spec.name] = statistics[spec.name], Ending.OK
                continue
            found = eigen(statistics[spec.name])
            endings[spec.name] = found.ending
            if found.values is not None and found.vectors is not None:
                values[spec.name], cache[spec.name] = found.values, found.vectors
        if len(values) < len(self.statistics):
            return Refreshed(old, endings)
        inverse = (outer(values["G"], values["A"]) + damping).reciprocal()
        return Refreshed(cache | {"inverse": inverse}, endings)
