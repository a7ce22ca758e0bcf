"""K-FAC: the Fisher block of a layer as the Kronecker product of A (inputs) and G (output gradients)."""

from collections.abc import Mapping

from torch import Tensor

from ngd_dist.config import KFAC as KFACConfig
from ngd_dist.cost import LayerShape
from ngd_dist.damping import pi_split
from ngd_dist.inversion import Ending, invert
from ngd_dist.kronecker import precondition, second_moment
from ngd_dist.layers.base import Rows
from ngd_dist.preconditioners.base import Cache, Preconditioner, Refreshed
from ngd_dist.statistics import StatisticSpec

__all__ = ["KFAC"]


class KFAC(Preconditioner):
    """A = (1/N) sum a a^T over samples and positions, G = (1/(N P)) sum g g^T. Sources: [MG15], [GM16] for P > 1.

    With `sharing="reduce"` a is averaged and g summed over positions before, and P is 1. Source: [E23].
    """

    def __init__(self, shape: LayerShape, config: KFACConfig) -> None:
        super().__init__(shape)
        self._reduces = config.sharing == "reduce"
        self.statistics = (
            StatisticSpec("A", (shape.inputs, shape.inputs), is_symmetric=True),
            StatisticSpec("G", (shape.outputs, shape.outputs), is_symmetric=True),
        )

    def estimate(self, rows: Rows, due: frozenset[str]) -> dict[str, Tensor]:
        estimates: dict[str, Tensor] = {}
        if "A" in due:
            a_NPI = rows.a_NPI.mean(1, keepdim=True) if self._reduces else rows.a_NPI
            estimates["A"] = second_moment(a_NPI, 1 / a_NPI.shape[0])
        if "G" in due:
            g_NPO = rows.g_NPO.sum(1, keepdim=True) if self._reduces else rows.g_NPO
            estimates["G"] = second_moment(g_NPO, 1 / (g_NPO.shape[0] * g_NPO.shape[1]))
        return estimates

    def refresh(self, statistics: Mapping[str, Tensor], damping: float, old: Cache | None) -> Refreshed:
        """Inverts both factors whenever one is new: pi ties them, and the cache stays a function of what is current."""
        damping_a, damping_g = pi_split(statistics["A"], statistics["G"], damping)
        inverses = {"A": invert(statistics["A"], damping_a), "G": invert(statistics["G"], damping_g)}
        endings: dict[str, Ending] = {name: inverse.ending for name, inverse in inverses.items()}
        cache: Cache = dict(old or {})
        cache |= {name: inverse.value for name, inverse in inverses.items() if inverse.value is not None}
        return Refreshed(cache if cache.keys() == inverses.keys() else None, endings)

    def apply(self, cache: Cache, grad_OI: Tensor) -> Tensor:
        return precondition(cache["A"], cache["G"], grad_OI)

    def refresh_flops(self) -> int:
        # Cholesky and the inverse from it: n^3 / 3 + 2 n^3 / 3 multiply-adds, two operations each.
        return 2 * (self.shape.inputs**3 + self.shape.outputs**3)
