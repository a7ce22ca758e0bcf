"""One process: nothing travels."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ngd_dist.statistics import Key
from ngd_dist.strategies.base import Collected, Report, Strategy, collected

__all__ = ["Single"]


class Single(Strategy):
    """Every layer is this rank's own."""

    def holds(self, layer: str) -> bool:
        return True

    def collect(
        self,
        due: Mapping[Key, Tensor],
        counts: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        plain: list[Tensor],
    ) -> Collected:
        return collected(due, counts, gradients, plain)

    def publish(
        self,
        directions: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, int]],
        reports: Mapping[Key, Report],
        due: Sequence[Key],
    ) -> tuple[dict[str, Tensor], dict[Key, Report]]:
        return dict(directions), dict(reports)
