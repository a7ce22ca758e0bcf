"""One process: nothing travels."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ngd_dist.statistics import Key
from ngd_dist.strategies.base import Collected, Local, Report, Strategy, collected

__all__ = ["Single"]


class Single(Strategy):
    """Every layer is this rank's own."""

    def holds(self, layer: str) -> bool:
        return True

    def collect(self, local: Local) -> Collected:
        return collected(local.due, local.counts, local.gradients, local.plain)

    def publish(
        self, directions: Mapping[str, Tensor], reports: Mapping[Key, Report], due: Sequence[Key]
    ) -> tuple[dict[str, Tensor], dict[Key, Report]]:
        return dict(directions), dict(reports)
