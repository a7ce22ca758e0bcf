"""K-FAC: the Fisher block of a layer as the Kronecker product of A (inputs) and G (output gradients)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ngd_dist.config import KFAC as KFACConfig
from ngd_dist.factors.cost import ROWS_CHECK, LayerShape
from ngd_dist.factors.dense import Dense
from ngd_dist.factors.form import FactorForm, Form
from ngd_dist.factors.gram import Gram
from ngd_dist.factors.kronecker import from_basis, outer, to_basis
from ngd_dist.inversion import Ending, Problem, Solution
from ngd_dist.layers.batch import LayerBatch
from ngd_dist.preconditioners.base import Cache, Preconditioner, Refreshed, Rows, with_inverses
from ngd_dist.preconditioners.factors import Factors, factor_forms
from ngd_dist.preconditioners.few_rows import FactorInverse, from_rows, kept_rows, loaded, saved, with_rows

__all__ = ["KFAC"]

Statistics = Mapping[str, Tensor]


class KFAC(Preconditioner):
    """A and G as in `Factors`, with the damping shared between them by pi, or exact in their eigenbases.

    Both are inverted when either is new: pi ties them. With pis of different moments the damping of the product would
    be lambda times their ratio, which falls without bound while G vanishes and A stays.
    """

    is_blockwise = True

    def __init__(self, shape: LayerShape, config: KFACConfig, max_dense: int) -> None:
        super().__init__(shape)
        self._factors = Factors(shape, config.sharing, self.forms(shape, config, max_dense))
        self._mode = _mode_of(config, self._factors, shape)
        self.statistics = self._factors.specs
        self.entries = self._mode.entries

    def forms(self, shape: LayerShape, config: KFACConfig, max_dense: int) -> Mapping[str, FactorForm]:
        """Returns the forms of A and G. A subclass may choose others."""
        takes_few = config.rows is None and config.damping_form == "pi"
        return factor_forms(shape, max_dense, config.rows, Gram if takes_few else Dense)

    def estimate(self, batch: LayerBatch, due: frozenset[str], shared: Cache) -> dict[str, Tensor]:
        return self._factors.estimate(batch, due)

    def problems(
        self, statistics: Statistics, fresh: frozenset[str], damping: float, old: Cache | None
    ) -> dict[str, Problem]:
        """Returns both factors if one is new: pi ties them, and the cache is a function of the present statistics."""
        return self._mode.problems(statistics, damping, old or {})

    def error(self, name: str, statistics: Statistics, damping: float, old: Cache) -> Tensor | None:
        return self._mode.error(name, statistics, damping, old)

    def refresh(
        self,
        statistics: Statistics,
        fresh: frozenset[str],
        damping: float,
        old: Cache | None,
        solutions: Mapping[str, Solution],
    ) -> Refreshed:
        return self._mode.refresh(statistics, damping, old, solutions)

    def apply(self, cache: Cache, grad_BOI: Tensor) -> Tensor:
        return self._mode.apply(cache, grad_BOI)

    def rows_pay(self, cache: Cache, rows: int) -> bool:
        # Of a step that refreshes the layer, the cache may have the rows of one factor and need those of the other.
        kept = frozenset(kept_rows(cache))
        return self._mode.rows_pay(cache, rows) or (len(kept) == 1 and self._mode.rows_pay(cache, rows, kept))

    def gradient_rows(self, cache: Cache, fresh: frozenset[str], captured: Rows) -> tuple[Tensor, Tensor] | None:
        return self._mode.gradient_rows(cache, fresh, captured)

    def apply_rows(self, cache: Cache, a_BRI: Tensor, g_BRO: Tensor, share: float) -> Tensor:
        assert isinstance(self._mode, _Split)
        return from_rows(*self._mode.inverses(cache), a_BRI, g_BRO, share)

    def saved(self, cache: Cache) -> Cache:
        return saved(cache, self._factors.forms)

    def loaded(self, entries: Cache, *, keeps_rows: bool) -> Cache:
        return loaded(entries, self._factors.forms, keeps_rows=keeps_rows)

    def refresh_flops(self) -> int:
        return self._mode.refresh_flops()

    def apply_flops(self) -> int:
        return self._mode.apply_flops()


class _Split:
    """The inverses of both factors, each with its share of the damping. If one fails, the old one stays."""

    def __init__(self, factors: Factors) -> None:
        self._factors = factors
        self._by_gradient = factors.product_flops()  # at most
        self.entries = {name: form.inverse for name, form in factors.forms.items()}

    def problems(self, statistics: Statistics, damping: float, old: Cache) -> dict[str, Problem]:
        split = self._factors.damping(statistics, damping)
        whole = {name: inverse for name, inverse in old.items() if name not in kept_rows(old)}
        return {
            name: form.problem(statistics[name], split[name], whole.get(name))
            for name, form in self._factors.forms.items()
        }

    def error(self, name: str, statistics: Statistics, damping: float, old: Cache) -> Tensor | None:
        split = self._factors.damping(statistics, damping)
        return self._factors.forms[name].error(statistics[name], split[name], old[name])

    def refresh(
        self, statistics: Statistics, damping: float, old: Cache | None, solutions: Mapping[str, Solution]
    ) -> Refreshed:
        refreshed = with_inverses(old, solutions, self.entries)
        if refreshed.cache is None:
            return refreshed
        fresh = [name for name in solutions if refreshed.endings[name] is Ending.OK]
        cache = with_rows(
            refreshed.cache,
            fresh,
            self._factors.forms,
            statistics,
            lambda: self._factors.damping(statistics, damping),
        )
        return Refreshed(cache, refreshed.endings)

    def apply(self, cache: Cache, grad_BOI: Tensor) -> Tensor:
        A, G = self.inverses(cache)
        return G.left(A.right(grad_BOI))

    def inverses(self, cache: Cache) -> tuple[FactorInverse, FactorInverse]:
        """Returns those of A and of G."""
        A, G = (FactorInverse.of(name, self._factors.forms[name], cache) for name in ("A", "G"))
        return A, G

    def rows_pay(self, cache: Cache, rows: int, fresh: frozenset[str] = frozenset()) -> bool:
        """Returns whether the row form of a direction takes fewer operations: see `few_rows`.

        fresh: the factors that are made of these very rows.
        """
        if not fresh and self._by_gradient <= ROWS_CHECK:
            return False
        if self._factors.sums_positions or not all(isinstance(form, Dense) for form in self._factors.forms.values()):
            return False
        (blocks, outputs, inputs), (A, G) = self._factors.gradient, self.inverses(cache)
        of_a, of_g = (2 * rows if n in fresh else f.product_flops for n, f in (("A", A), ("G", G)))
        by_rows = rows * blocks * (inputs * of_a + outputs * of_g + 2 * outputs * inputs)
        by_gradient = blocks * outputs * inputs * (A.product_flops + G.product_flops)
        by_gradient += sum(f.parts.solving_flops for n, f in (("A", A), ("G", G)) if n in fresh and f.parts)
        return by_rows + ROWS_CHECK < by_gradient

    def gradient_rows(self, cache: Cache, fresh: frozenset[str], captured: Rows) -> tuple[Tensor, Tensor] | None:
        kept = {name: rows for name, rows in kept_rows(cache).items() if name in fresh}
        others = None if len(kept) == 2 else captured()
        a_BRI, g_BRO = (kept.get(name, other) for name, other in zip(("A", "G"), others or (None, None), strict=True))
        if a_BRI is None or g_BRO is None or a_BRI.shape[1] != g_BRO.shape[1]:
            return None
        return (a_BRI, g_BRO) if self.rows_pay(cache, a_BRI.shape[1], frozenset(kept)) else None

    def refresh_flops(self) -> int:
        return self._factors.inverse_flops()

    def apply_flops(self) -> int:
        return self._factors.product_flops()


class _ScaledSplit(_Split):
    """As `_Split`, but some inverses are kept times their damping: `scale` is one over the product of the dampings.

    The scale belongs to both inverses together: if one fails, both old ones stay.
    """

    def __init__(self, factors: Factors, blocks: int) -> None:
        super().__init__(factors)
        self.entries = {**self.entries, "scale": Form((blocks, 1, 1))}

    def error(self, name: str, statistics: Statistics, damping: float, old: Cache) -> Tensor | None:
        return None

    def refresh(
        self, statistics: Statistics, damping: float, old: Cache | None, solutions: Mapping[str, Solution]
    ) -> Refreshed:
        if any(solution.ending is not Ending.OK for solution in solutions.values()):
            return Refreshed(old, {name: solution.ending for name, solution in solutions.items()})
        split = self._factors.damping(statistics, damping)
        lacking = [split[name] for name, form in self._factors.forms.items() if form.lacks_damping]
        scale = torch.stack(lacking).prod(0).reciprocal().view(-1, 1, 1)
        return with_inverses({**(old or {}), "scale": scale}, solutions, self.entries)

    def rows_pay(self, cache: Cache, rows: int, fresh: frozenset[str] = frozenset()) -> bool:
        return False

    def apply(self, cache: Cache, grad_BOI: Tensor) -> Tensor:
        return self._factors.precondition(cache, grad_BOI).mul_(cache["scale"])


class _Exact:
    """Bases and 1 / (d_G d_A^T + damping): the old ones unless both decompositions succeed."""

    def __init__(self, factors: Factors, gradient: tuple[int, int, int]) -> None:
        self._factors = factors
        self.entries = {**factors.bases, "inverse": Form(gradient)}

    def problems(self, statistics: Statistics, damping: float, old: Cache) -> dict[str, Problem]:
        return self._factors.to_decompose(statistics)

    def error(self, name: str, statistics: Statistics, damping: float, old: Cache) -> Tensor | None:
        return None

    def refresh(
        self, statistics: Statistics, damping: float, old: Cache | None, solutions: Mapping[str, Solution]
    ) -> Refreshed:
        eigen = self._factors.decomposition(statistics, solutions)
        if eigen.values is None or eigen.bases is None:
            return Refreshed(old, eigen.endings)
        inverse = (outer(eigen.values["G"], eigen.values["A"]) + damping).reciprocal()
        return Refreshed({**eigen.bases, "inverse": inverse}, eigen.endings)

    def apply(self, cache: Cache, grad_BOI: Tensor) -> Tensor:
        A, G = cache.get("A"), cache.get("G")
        return from_basis(A, G, to_basis(A, G, grad_BOI) * cache["inverse"])

    def rows_pay(self, cache: Cache, rows: int, fresh: frozenset[str] = frozenset()) -> bool:
        return False

    def gradient_rows(self, cache: Cache, fresh: frozenset[str], captured: Rows) -> tuple[Tensor, Tensor] | None:
        return None

    def refresh_flops(self) -> int:
        return self._factors.eigen_flops()

    def apply_flops(self) -> int:
        return 2 * self._factors.product_flops()


def _mode_of(config: KFACConfig, factors: Factors, shape: LayerShape) -> _Split | _Exact:
    """Returns the mode that turns A and G into a cache, and the cache into a direction, for the methods of `KFAC`."""
    if config.damping_form == "exact":
        return _Exact(factors, shape.gradient)
    if any(form.lacks_damping for form in factors.forms.values()):
        return _ScaledSplit(factors, shape.blocks)
    return _Split(factors)
