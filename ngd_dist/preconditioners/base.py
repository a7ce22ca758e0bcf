"""The one contract of all methods. State (statistics) is always current; the cache is rebuilt now and then from it."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

from torch import Tensor

from ngd_dist.factors.caches import Cache
from ngd_dist.factors.cost import LayerShape
from ngd_dist.factors.form import Form
from ngd_dist.inversion import Ending, Inverse, Problem, Solution
from ngd_dist.layers.base import LayerBatch
from ngd_dist.statistics.statistic import StatisticSpec

__all__ = ["Cache", "Preconditioner", "Refreshed", "with_inverses"]

# What the model of `Preconditioner.work` counts as operations beside those of products, from the times of ResNet-20's
# layers and the MLP's in one thread: the passes over memory for each number of a row, and the calls for a statistic.
PASSES = 256
CALLS = 2**25


@dataclass(frozen=True, slots=True)
class Refreshed:
    """A new cache, and how the inversion of each statistic ended. A failed part of the cache is the old one.

    `cache` is None where a part failed that had no old one: the layer then takes a plain gradient step.
    """

    cache: Cache | None
    endings: Mapping[str, Ending]


class Preconditioner(ABC):
    """How one layer's gradient becomes its direction. Holds no tensors.

    `statistics`: the tensors that are averaged over samples, ranks and time. `entries`: the forms of the entries of a
    cache; a dense inverse may be kept in 16 bits. `shared`: the entries that `estimate` reads, and that every rank
    therefore gets; they follow from the statistics that are not `in_basis`. `flops_by_statistic`: if each statistic
    alone decides a part of the cache, the operations of making that part; empty if the cache is made as a whole.
    `reads_slopes`: whether `estimate` reads `LayerBatch.slopes_BNPO`, for which activation modules are watched.
    """

    statistics: tuple[StatisticSpec, ...]
    entries: Mapping[str, Form]
    shared: tuple[str, ...] = ()
    flops_by_statistic: Mapping[str, int] = MappingProxyType({})
    reads_slopes: bool = False

    def __init__(self, shape: LayerShape) -> None:
        self.shape = shape

    @property
    def cache_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the entries of a cache."""
        return {name: form.shape for name, form in self.entries.items()}

    @abstractmethod
    def estimate(self, batch: LayerBatch, due: frozenset[str], shared: Cache) -> dict[str, Tensor]:
        """Returns the due statistics of one micro-batch, each a mean over its samples. Called on every rank.

        A statistic that does not read gradients must not touch those of `rows`. `shared` lacks what no refresh has
        made yet; a statistic that needs it is left out.
        """

    def problems(
        self, statistics: Mapping[str, Tensor], fresh: frozenset[str], damping: float, old: Cache | None
    ) -> dict[str, Problem]:
        """Returns what must be inverted or decomposed, by statistic, before `refresh` with the same arguments.

        O(n^3), rare, and the same for many layers: so all of a step's are solved together. None unless overridden.
        """
        return {}

    def error(self, name: str, statistics: Mapping[str, Tensor], damping: float, old: Cache) -> Tensor | None:
        """Returns how wrong the part of a cache that this statistic makes has become for its value now, [].

        0 where it is what a refresh would give, and less than 1 while it is of any use. None where a method can't tell.
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

        `fresh` names those that are new since `old`; none are where only the damping changed. Statistics that are
        measured in the cache's own basis may be absent.
        """

    @abstractmethod
    def apply(self, cache: Cache, grad_BOI: Tensor) -> Tensor:
        """Returns the direction (F + damping I)^-1 grad, [B, O, I]. O(n^2), every step; called on the owners."""

    @abstractmethod
    def refresh_flops(self) -> int:
        """Returns the floating-point operations of one refresh, for placement and for staggering."""

    def work(self, rows: Mapping[str, int]) -> int:
        """Returns the operations of estimating these statistics, each from so many rows, and of the refresh they cause.

        A model, for staggering. What is measured in a cache's basis only fills it.
        """
        due = [spec for spec in self.statistics if spec.name in rows]
        estimates = sum(CALLS + rows[spec.name] * _row_flops(spec) for spec in due)
        if self.flops_by_statistic:
            return estimates + sum(self.flops_by_statistic[spec.name] for spec in due)
        return estimates + (0 if all(spec.in_basis for spec in due) else self.refresh_flops())

    @abstractmethod
    def apply_flops(self) -> int:
        """Returns the floating-point operations of `apply`."""


def with_inverses(old: Cache | None, solutions: Mapping[str, Solution], entries: Collection[str]) -> Refreshed:
    """Returns the old cache with each inverse that there is in its place, for a cache of inverses alone."""
    cache: Cache = dict(old or {})
    for name, solution in solutions.items():
        assert isinstance(solution, Inverse)
        if solution.value is not None:
            cache[name] = solution.value
    endings = {name: solution.ending for name, solution in solutions.items()}
    return Refreshed(cache if cache.keys() == set(entries) else None, endings)


def _row_flops(spec: StatisticSpec) -> int:
    """Returns the operations for one more row: products with itself, or passes over it where those take longer."""
    return max(2 * prod(spec.shape), PASSES * spec.form.row_numbers)
