"""What one optimizer step did and cost: plain numbers, safe to send anywhere."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ["Adapted", "Refresh", "StepStats", "Stopwatch"]


@dataclass(frozen=True, slots=True)
class Refresh:
    """One refreshed statistic: its relative change, and the name of the inversion's ending."""

    statistic: str
    change: float
    ending: str


@dataclass(frozen=True, slots=True)
class Adapted:
    """What a step that followed the loss found: rho, the loss's change over the model's; None where none was taken."""

    reduction_ratio: float | None = None


@dataclass(slots=True)
class StepStats:
    """One step. `ages` and `intervals` follow the order of `NGD.statistic_names`.

    An age counts the steps since the statistic in use was measured; `intervals` are the steps it may stay in use.
    Seconds are host time on this rank: on CUDA, where work is queued, they show where the host waits. Bytes are what
    this rank sends under ring algorithms, by kind. `failed_inversions` counts all steps so far over all ranks, and
    `skipped_steps` those that were given up for a gradient that was not finite. lr, momentum and damping are the first
    param group's, after the step.
    """

    step: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_sent: dict[str, int] = field(default_factory=dict)
    ages: list[int] = field(default_factory=list)
    intervals: list[int] = field(default_factory=list)
    refreshes: list[Refresh] = field(default_factory=list)
    failed_inversions: int = 0
    skipped_steps: int = 0
    lr: float = 0.0
    momentum: float = 0.0
    damping: float = 0.0
    adapted: Adapted = Adapted()


class Stopwatch:
    """Adds up host seconds per phase."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside the block to the phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Returns the seconds since the last call and starts again from zero."""
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds
