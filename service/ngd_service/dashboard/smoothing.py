"""Pure: what is done to the points of a curve before they are drawn or told in words."""

import math
from collections.abc import Mapping, Sequence
from statistics import median_low
from typing import TypeVar

__all__ = ["Points", "aligned", "range_without_outliers", "smoothed", "trend"]

Points = Sequence[tuple[int, float]]
X = TypeVar("X", int, float)
BLOCKS, SMALLEST_BLOCK = 64, 5  # a spike that fills less than half of a block is left out
OUTLYING = 3  # times the range without them is the range of values with outliers


def aligned(points: Mapping[str, Points]) -> dict[str, Points]:
    """The same steps for every series, as stacking needs them: a part that a step did not report took nothing."""
    steps = sorted({step for values in points.values() for step, _ in values})
    known = {key: dict(values) for key, values in points.items()}
    return {key: [(step, values.get(step, 0.0)) for step in steps] for key, values in known.items()}


def smoothed(points: Sequence[tuple[X, float]], weight: float) -> list[tuple[X, float]]:
    """Returns the exponential moving average over the points, without its bias to 0 at the start.

    weight: of the past. A value that is not finite stays as it is and has no part in the average.
    """
    average, weights = 0.0, 0.0
    drawn = list[tuple[X, float]]()
    for step, value in points:
        if not math.isfinite(value):
            drawn.append((step, value))
            continue
        average = weight * average + (1 - weight) * value
        weights = weight * weights + 1 - weight
        drawn.append((step, average / weights))
    return drawn


def range_without_outliers(series: Sequence[Points]) -> tuple[float, float] | None:
    """Returns the lowest and the highest value that an axis should show; None: all of them, for none lies far out.

    That is the range of the medians of short blocks, of the first and of the last value: a curve that falls fast at
    its start keeps its start, and one that has just run away is seen to. A tenth is added on both sides.
    """
    calm, every = [], []
    for points in series:
        values = [value for _, value in points if math.isfinite(value)]
        if not values:
            continue
        size = max(SMALLEST_BLOCK, len(values) // BLOCKS)
        calm += [values[0], values[-1]]
        calm += [median_low(values[i : i + size]) for i in range(0, len(values) - size + 1, size)]
        every += [min(values), max(values)]
    if not calm:
        return None
    low, high = min(calm), max(calm)
    margin = (high - low) / 10
    if margin == 0 or max(every) - min(every) <= OUTLYING * (high - low):
        return None
    grain = 10 ** math.floor(math.log10(margin))  # the ends of an axis that grows move seldom
    low, high = math.floor((low - margin) / grain) * grain, math.ceil((high + margin) / grain) * grain
    return max(low, min(every)), min(high, max(every))


def trend(points: Points, window: int = 20) -> str:
    """Returns whether the newest points rise or fall, as the end of a sentence; "" for too few to tell."""
    recent = [value for _, value in points[-window:] if math.isfinite(value)]
    if len(recent) < 4:
        return ""
    half = len(recent) // 2
    before, after = sum(recent[:half]) / half, sum(recent[half:]) / (len(recent) - half)
    if abs(after - before) <= 0.01 * max(abs(before), abs(after)):
        return ", steady"
    return ", rising" if after > before else ", falling"
