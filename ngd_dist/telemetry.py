"""Telemetry of one optimizer step: plain numbers, safe to send anywhere."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

__all__ = ["Adapted", "Refresh", "StepStats", "Stopwatch"]


@dataclass(frozen=True, slots=True)
class Refresh:
    """One statistic that was due. A number that was not measured is infinity.

    change, change_to_before: relative, against the last two values in use. noise: the relative sampling error of the
    new value. threshold: the change from which on the statistic counts as changed. error: ||I - (X + damping) inverse||
    / sqrt(n) of the inverse that was in use, for the new value X; of a basis, the share of X off its diagonal.
    residual: the same of the new inverse. ending: the name of the inversion's ending. age: the steps for which the last
    value was in use. interval: the steps until the statistic is due again, at most. seconds: host time for estimating
    and inverting, on the rank that reports. bytes_sent: by each rank, for this statistic.
    """

    statistic: str
    change: float
    change_to_before: float
    noise: float
    threshold: float
    error: float
    residual: float
    ending: str
    age: int
    interval: int
    seconds: float
    bytes_sent: int


@dataclass(frozen=True, slots=True)
class Adapted:
    """The result of a step that adapts to the loss: rho, the loss's change over the model's; None if not measured."""

    reduction_ratio: float | None = None


@dataclass(slots=True)
class StepStats:
    """One step. `ages` and `intervals` follow the order of `NGD.statistic_names`.

    An age counts the steps since the statistic in use was measured; an interval, the steps that it may stay in use.
    Seconds are host time on this rank: on CUDA, where work is queued, they show where the host waits. Bytes are those
    that this rank sends to others, by kind; an all-reduce counts as a ring sends it. `failed_inversions` counts all
    steps so far over all ranks, `skipped_steps` the steps that were given up because a gradient was not finite, or that
    `skip` told of. lr, momentum and damping are those of the first param group, after the step.
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
    """Adds up host seconds per phase. A phase inside another one counts as a part of the outer one.

    clock: that of all stopwatches. A measurement on a busy machine takes `time.process_time`.
    """

    clock: ClassVar[Callable[[], float]] = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._is_running = False

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside the block to the phase."""
        if self._is_running:
            yield
            return
        start, self._is_running = Stopwatch.clock(), True
        try:
            yield
        finally:
            self._is_running = False
            self._seconds[name] += Stopwatch.clock() - start

    def take(self) -> dict[str, float]:
        """Returns the seconds since the last call and starts again from zero."""
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds
