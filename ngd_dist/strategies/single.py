"""One process: nothing travels."""

from collections.abc import Sequence

from ngd_dist.statistics import Key
from ngd_dist.strategies.base import Collected, Findings, Local, Strategy, collected

__all__ = ["Single"]


class Single(Strategy):
    """Every layer is this rank's own."""

    is_replicated = True

    def holds(self, layer: str) -> bool:
        return True

    def collect(self, local: Local) -> Collected:
        return collected(local.non_finite, local.due, local.tallies, local.gradients, local.plain)

    def publish(self, findings: Findings, due: Sequence[Key]) -> Findings:
        return findings
