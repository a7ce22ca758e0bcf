"""Telemetry of one optimizer step: plain numbers, safe to send anywhere."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

__all__ = ["Adapted", "LayerStats", "Refresh", "Spectrum", "StepStats", "Stopwatch"]


@dataclass(frozen=True, slots=True)
class Refresh:
    """One statistic that was due. A number that was not measured is infinity.

    change, change_to_before: relative, against the last two values in use. noise: the relative sampling error of the
    new value. threshold: the change from which on the statistic counts as changed. error: ||I - (X + damping) inverse||
    / sqrt(n) of the inverse that was in use, for the new value X; of a basis, the share of X off its diagonal.
    residual: the same of the new inverse. method: the name of the inversion's last try; None if nothing was inverted.
    ending: the name of the inversion's ending. age: the steps for which the last value was in use. interval: the steps
    until the statistic is due again, at most. seconds: host time for estimating and inverting, on the rank that
    reports; inversion_seconds: for inverting alone, this statistic's share by n^3 of what its rank inverted at once.
    bytes_sent: by each rank, for this statistic.
    """

    statistic: str
    change: float
    change_to_before: float
    noise: float
    threshold: float
    error: float
    residual: float
    method: str | None
    ending: str
    age: int
    interval: int
    seconds: float
    inversion_seconds: float
    bytes_sent: int


@dataclass(frozen=True, slots=True)
class Adapted:
    """The result of a step that adapts to the loss: rho, the loss's change over the model's; None if not measured."""

    reduction_ratio: float | None = None


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Eigenvalues of a factor, without damping.

    quantiles: the least eigenvalue, those that 25, 50 and 75 per cent don't exceed, and the largest. damping: in the
    factor's own unit, as it is added to these eigenvalues; where the damping lambda is added to the products of two
    factors' eigenvalues, lambda over the other factor's mean eigenvalue. NaN if that is not known.

    is_estimate: whether they are from 24 products with the factor, because its inversion makes no eigenvalues. The
    largest is then a lower bound, as a rule within 1 %, and the least an upper bound; between them a share of
    eigenvalues may be off by 0.15, and eigenvalues below a thousandth of the largest are not told apart.
    """

    quantiles: tuple[float, float, float, float, float]
    damping: float
    is_estimate: bool = False

    @property
    def condition(self) -> float:
        """The condition number of the damped factor; without damping if that is not known. Estimated, a lower bound.

        >>> Spectrum((0.0, 0.0, 0.0, 1.0, 9.0), damping=1.0).condition
        10.0
        """
        damping = 0.0 if math.isnan(self.damping) else self.damping
        least, largest = self.quantiles[0] + damping, self.quantiles[-1] + damping
        return largest / least if least > 0 else math.inf


@dataclass(frozen=True, slots=True)
class LayerStats:
    """Gradient and update of each layer in the step `step`: lists follow the order of `NGD.layers`. See `NGD.watch`.

    The gradient is the mean over the global batch. The update is lr times the direction after its clipping, without
    momentum and decay; a `Preconditioner`, whose update another optimizer takes, has the direction. gradient_norms,
    update_norms: 2-norms. cosines: of gradient and direction; NaN if one of them is 0. kl: u^T (F + damping) u / 2 of
    the update u, which the damped quadratic model has for the KL divergence of the step, and `KLClip` bounds twice of.
    clip_factor: the factor of `config.clip`; None if there is none. spectra: of each statistic that is a
    factor, by its name: exact ones of the newest refresh, of the others the newest estimate, a few of which are made in
    each watched step.
    """

    step: int
    gradient_norms: list[float]
    update_norms: list[float]
    cosines: list[float]
    kl: float
    clip_factor: float | None
    spectra: dict[str, Spectrum]


@dataclass(slots=True)
class StepStats:
    """One step. `ages` and `intervals` follow the order of `NGD.statistic_names`.

    An age counts the steps since the statistic in use was measured; an interval, the steps that it may stay in use.
    Seconds are host time on this rank: on CUDA, where work is queued, they show where the host waits. Bytes are those
    that this rank sends to others, by kind; an all-reduce counts as a ring sends it. `failed_inversions` counts all
    steps so far over all ranks, `skipped_steps` the steps that were given up because a gradient was not finite, or that
    `skip` told of. lr, momentum and damping are those of the first param group, after the step. `layers`: of an earlier
    step, which it names; None in most steps, and unless `NGD.watch` was called.
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
    layers: LayerStats | None = None


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
