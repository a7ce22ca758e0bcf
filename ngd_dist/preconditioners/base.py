"""The contract of all methods. Statistics are always current; the cache is rebuilt from them now and then."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

from torch import Tensor

from ngd_dist.factors.caches import Cache
from ngd_dist.factors.cost import LayerShape
from ngd_dist.factors.form import Form
from ngd_dist.inversion import Ending, Inverse, Problem, Solution
from ngd_dist.layers.batch import LayerBatch
from ngd_dist.statistics.statistic import StatisticSpec

__all__ = ["Cache", "Preconditioner", "Refreshed", "with_inverses"]

# Costs that `Preconditioner.work` counts beside products, fitted to the times of ResNet-20's and an MLP's layers in one
# thread: operations per number of a row for passes over memory, and operations for the calls of each statistic and of
# each refresh. Two statistics of a small layer then share the step of its refresh.
PASSES = 256
CALLS = 2**25

# Returns the rows of a layer's gradient, a [B, R, I] and g [B, R, O], if there are any.
Rows = Callable[[], tuple[Tensor, Tensor] | None]


@dataclass(frozen=True, slots=True)
class Refreshed:
    """A new cache, and how the inversion of each statistic ended. A failed part of the cache is the old one.

    If a part failed that had no old one, `cache` is None: the layer then takes a plain gradient step.
    """

    cache: Cache | None
    endings: Mapping[str, Ending]


class Preconditioner(ABC):
    """Turns one layer's gradient into its direction. Holds no tensors.

    `statistics`: the tensors that are averaged over samples, ranks and time. `entries`: the forms of the entries of a
    cache; a dense inverse may be kept in 16 bits. `shared`: the entries that `estimate` reads, and that every rank
    therefore gets; they follow from the statistics that are not `in_basis`. `flops_by_statistic`: if each statistic
    alone decides a part of the cache, the operations of making that part; empty if the cache is made as a whole.
    `reads_slopes`: whether `estimate` reads `LayerBatch.slopes_BNPO`, for which activation modules are watched.
    `is_blockwise`: whether `estimate`, `problems` and `apply` treat blocks apart, and every statistic and entry has
    them in its first dimension, so that the blocks of several layers of one shape can be given at once.
    """

    statistics: tuple[StatisticSpec, ...]
    entries: Mapping[str, Form]
    shared: tuple[str, ...] = ()
    flops_by_statistic: Mapping[str, int] = MappingProxyType({})
    reads_slopes: bool = False
    is_blockwise: bool = False

    def __init__(self, shape: LayerShape) -> None:
        self.shape = shape

    @property
    def cache_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the entries of a cache."""
        return {name: form.shape for name, form in self.entries.items()}

    @abstractmethod
    def estimate(self, batch: LayerBatch, due: frozenset[str], shared: Cache) -> dict[str, Tensor]:
        """Returns the due statistics of one micro-batch, each a mean over its samples. Called on every rank.

        A statistic that does not read gradients must not touch those of `batch`. If `shared` lacks an entry, because no
        refresh has made it yet, a statistic that needs the entry is left out.
        """

    def problems(
        self, statistics: Mapping[str, Tensor], fresh: frozenset[str], damping: float, old: Cache | None
    ) -> dict[str, Problem]:
        """Returns the inversions and decompositions, by statistic, that `refresh` with the same arguments needs.

        They are O(n^3), rare, and alike in many layers, so all of a step are solved together. None unless overridden.
        """
        return {}

    def error(self, name: str, statistics: Mapping[str, Tensor], damping: float, old: Cache) -> Tensor | None:
        """Returns the error of this statistic's part of the cache for the present value of the statistic, [].

        0 if a refresh would give the same, and less than 1 if the part is of any use. None if a method can't tell.
        """
        return None

    @abstractmethod
    def refresh(
        self,
        statistics: Mapping[str, Tensor],
        fresh: frozenset[str],
        damping: float,
        old: Cache | None,
        solutions: Mapping[str, Solution],
    ) -> Refreshed:
        """Returns the cache of these statistics, from the solutions of `problems`. Called on the layer's owners.

        `fresh` names the statistics that are new since `old`: none if only the damping changed. Statistics that are
        measured in the cache's basis may be absent.
        """

    @abstractmethod
    def apply(self, cache: Cache, grad_BOI: Tensor) -> Tensor:
        """Returns the direction (F + damping I)^-1 grad, [B, O, I]. O(n^2), every step; called on the owners."""

    def rows_pay(self, cache: Cache, rows: int) -> bool:
        """Returns whether `apply_rows` is cheaper than `apply` while this cache ages, for gradients of so many rows."""
        return False

    def gradient_rows(self, cache: Cache, fresh: frozenset[str], captured: Rows) -> tuple[Tensor, Tensor] | None:
        """Returns a_BRI and g_BRO from which `apply_rows` is cheaper than `apply`; None if no rows are.

        fresh: the statistics that were made in this step from the gradients of the loss, or from no gradients.
        captured: returns the rows of the loss, if they were kept.
        """
        return None

    def apply_rows(self, cache: Cache, a_BRI: Tensor, g_BRO: Tensor, share: float) -> Tensor:
        """Returns the direction, [B, O, I], of the gradient share * sum_r g_r a_r^T, for rows of `gradient_rows`."""
        raise NotImplementedError

    def saved(self, cache: Cache) -> Cache:
        """Returns the cache as it is saved: tensors of the shapes of `entries`."""
        return cache

    def loaded(self, entries: Cache, *, keeps_rows: bool) -> Cache:
        """Returns the cache that was `saved`. keeps_rows: whether it may have rows in place of statistics."""
        return entries

    @abstractmethod
    def refresh_flops(self) -> int:
        """Returns the floating-point operations of one refresh, for placement and for staggering."""

    def work(self, rows: Mapping[str, int]) -> int:
        """Returns the operations of estimating these statistics, and of the refresh that they cause.

        A model, for staggering. rows: by statistic, the number behind it. Statistics in a basis only fill the cache.
        """
        due = [spec for spec in self.statistics if spec.name in rows]
        estimates = sum(CALLS + rows[spec.name] * _row_flops(spec) for spec in due)
        if self.flops_by_statistic:
            return estimates + sum(self.flops_by_statistic[spec.name] for spec in due)
        return estimates + (0 if all(spec.in_basis for spec in due) else 2 * CALLS + self.refresh_flops())

    @abstractmethod
    def apply_flops(self) -> int:
        """Returns the floating-point operations of `apply`."""


def with_inverses(old: Cache | None, solutions: Mapping[str, Solution], entries: Collection[str]) -> Refreshed:
    """Returns the old cache with every successful new inverse replacing its entry, for a cache of inverses alone."""
    cache: Cache = dict(old or {})
    for name, solution in solutions.items():
        assert isinstance(solution, Inverse)
        if solution.value is not None:
            cache[name] = solution.value
    endings = {name: solution.ending for name, solution in solutions.items()}
    return Refreshed(cache if cache.keys() >= set(entries) else None, endings)


def _row_flops(spec: StatisticSpec) -> int:
    """Returns the operations for one more row: products with itself, or passes over it if those take longer."""
    return max(2 * prod(spec.shape), PASSES * spec.form.row_numbers)
