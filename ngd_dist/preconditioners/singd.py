"""SINGD: roots of the inverse factors, moved by products towards what the newest statistics ask for; no inversion."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ngd_dist.config import SINGD as SINGDConfig
from ngd_dist.factors.blocks import BlockStructure
from ngd_dist.factors.cost import LayerShape
from ngd_dist.factors.low_rank import LowRankStructure
from ngd_dist.factors.structure import DiagonalStructure, Structure, per_block
from ngd_dist.inversion import Ending, Solution
from ngd_dist.layers.batch import LayerBatch
from ngd_dist.preconditioners.base import Cache, Preconditioner, Refreshed
from ngd_dist.preconditioners.factors import Factors

__all__ = ["SINGD"]

Statistics = Mapping[str, Tensor]
# The most that a step takes away from a root in any direction, as a share of it.
MOST = 0.5
# By factor: its root and the step of it in the cache, and the other factor.
ROOTS = {"A": ("K", "m_K", "G"), "G": ("C", "m_C", "A")}


class SINGD(Preconditioner):
    """Roots K and C: (K K^T) (x) (C C^T) is near (A (x) G + lambda I)^-1. A refresh moves them by one step:

        m_K = alpha_1 m_K + (1 - alpha_1) / 2 [t_C K^T A K + lambda s_C K^T K - I],    K = K (I - beta m_K)

    with t_C = tr(C^T G C) / O and s_C = tr(C^T C) / O, and the same for C with A and G exchanged. `kfac_like`: t and s
    are 1, and lambda is the factor's share by pi, so that K K^T is near (A + pi sqrt(lambda) I)^-1 and lambda means the
    same as under K-FAC. A and G are those of K-FAC. Brackets are projected on the structure. Source: [L23], its code.

    A step that is too long changes the sign of a root: beta is beta_1, or less if beta times a bound on the eigenvalues
    of m_K would exceed `MOST`. The code's normalised steps divide beta_1 by the largest entry of m_K if that exceeds 1,
    which bounds no eigenvalue, and shortens steps that are short enough. As there, m_K is a mean of the past. K begins
    as (mean eigenvalue + share of lambda)^-1/2 I, not as I, from which a factor of another size takes many steps. A
    factor that is new moves its own root. A new damping moves none: it counts from the next step on. A dense factor
    wider than `max_dense` is a diagonal.
    """

    is_blockwise = True

    def __init__(self, shape: LayerShape, config: SINGDConfig, max_dense: int) -> None:
        super().__init__(shape)
        self._config = config
        self._structures = {
            "A": _structure(shape.blocks, shape.inputs, config, max_dense),
            "G": _structure(shape.blocks, shape.outputs, config, max_dense),
        }
        self._factors = Factors(shape, config.sharing, self._structures)
        self.statistics = self._factors.specs
        self.entries = {}
        for name, (root, step, _) in ROOTS.items():
            form = self._structures[name].inverse
            self.entries |= {root: form, step: form} if config.momentum else {root: form}

    def estimate(self, batch: LayerBatch, due: frozenset[str], shared: Cache) -> dict[str, Tensor]:
        return self._factors.estimate(batch, due)

    def refresh(
        self,
        statistics: Statistics,
        fresh: frozenset[str],
        damping: float,
        old: Cache | None,
        solutions: Mapping[str, Solution],
    ) -> Refreshed:
        moved = [name for name in ROOTS if name in fresh or old is None]
        if not moved:
            return Refreshed(old, {})
        split = self._factors.damping(statistics, damping)
        new = self._moved(moved, statistics, damping, split, old or self._first(statistics, split))
        checked = [statistics[name] for name in moved] + [new[ROOTS[name][0]] for name in moved]
        is_finite = torch.stack([torch.isfinite(value).all() for value in checked]).tolist()  # one host read
        if all(is_finite):
            return Refreshed(new, dict.fromkeys(moved, Ending.OK))
        # Traces tie both roots: neither moves.
        ending = Ending.INACCURATE if all(is_finite[: len(moved)]) else Ending.NON_FINITE
        return Refreshed(old, dict.fromkeys(moved, ending))

    def apply(self, cache: Cache, grad_BOI: Tensor) -> Tensor:
        A, G = self._structures["A"], self._structures["G"]
        return G.left(cache["C"], A.right(grad_BOI, cache["K"]))

    def refresh_flops(self) -> int:
        return self._factors.inverse_flops()

    def apply_flops(self) -> int:
        return self._factors.product_flops()

    def _first(self, statistics: Statistics, split: Mapping[str, Tensor]) -> Cache:
        """Returns the roots of multiples of I, with steps of 0."""
        cache: Cache = {}
        for name, (root, step, _) in ROOTS.items():
            form = self._structures[name]
            cache[root] = form.identity((form.mean_eigenvalue(statistics[name]) + split[name]).rsqrt())
            if self._config.momentum:
                cache[step] = torch.zeros_like(cache[root])
        return cache

    def _moved(
        self, names: list[str], statistics: Statistics, damping: float, split: Mapping[str, Tensor], old: Cache
    ) -> Cache:
        """Returns the cache with the roots of these factors one step further, all from the old roots."""
        conjugated, squared = {}, {}
        for name, (root, _, _) in ROOTS.items():
            if name in names or not self._config.kfac_like:
                conjugated[name] = self._structures[name].conjugated(old[root], statistics[name])
                squared[name] = self._structures[name].squared(old[root])
        new, past = dict(old), self._config.momentum
        for name in names:
            form, (root, step, other) = self._structures[name], ROOTS[name]
            H, S = conjugated[name], squared[name]
            if self._config.kfac_like:
                total = H + per_block(split[name], S) * S
            else:
                traces = self._structures[other].mean_eigenvalue
                of_H, of_S = traces(conjugated[other]), damping * traces(squared[other])
                total = per_block(of_H, H) * H + per_block(of_S, S) * S
            m = (total - form.identity(torch.ones_like(split[name]))) * ((1 - past) / 2)
            if past:
                m = new[step] = m + past * old[step]
            rate = (MOST / form.bound(m)).clamp(max=self._config.rate)
            new[root] = old[root] - per_block(rate, m) * form.product(old[root], m)
        return new


def _structure(blocks: int, width: int, config: SINGDConfig, max_dense: int) -> Structure:
    """Returns the structure of a factor of this width; a rank or blocks as wide as the factor are all of it."""
    rows = width if config.rows is None else config.rows
    if config.structure == "diagonal" or (config.structure == "dense" and width > max_dense):
        return DiagonalStructure((blocks, width))
    if config.structure == "low_rank" and rows < width:
        return LowRankStructure((blocks, rows + 1, width))
    return BlockStructure.of(blocks, width, rows)
