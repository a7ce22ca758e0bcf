"""The one contract of all methods. State (statistics) is always current; the cache is rebuilt now and then from it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ngd_dist.cost import LayerShape
from ngd_dist.inversion import Ending
from ngd_dist.layers.base import Rows
from ngd_dist.statistics import StatisticSpec

__all__ = ["Cache", "Preconditioner", "Refreshed"]

Cache = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Refreshed:
    """A new cache, and how the inversion of each statistic ended. A failed part of the cache is the old one.

    `cache` is None where a part failed that had no old one: the layer then takes a plain gradient step.
    """

    cache: Cache | None
    endings: Mapping[str, Ending]


class Preconditioner(ABC):
    """How one layer's gradient becomes its direction. Holds no tensors."""

    statistics: tuple[StatisticSpec, ...]

    @abstractmethod
    def __init__(self, shape: LayerShape) -> None:
        """Sets `shape` and `statistics`."""
        self.shape = shape

    @abstractmethod
    def estimate(self, rows: Rows, due: frozenset[str]) -> dict[str, Tensor]:
        """Returns the due statistics of one micro-batch, each a mean over its samples. Called in backward."""

    @abstractmethod
    def refresh(self, statistics: Mapping[str, Tensor], damping: float, old: Cache | None) -> Refreshed:
        """Returns the cache of these statistics. O(n^3), rare; called on the layer's owners."""

    @abstractmethod
    def apply(self, cache: Cache, grad_OI: Tensor) -> Tensor:
        """Returns the direction (F + damping I)^-1 grad, [O, I]. O(n^2), every step; called on the layer's owners."""

    @abstractmethod
    def refresh_flops(self) -> int:
        """Returns the floating-point operations of one refresh, for placement and for staggering."""
