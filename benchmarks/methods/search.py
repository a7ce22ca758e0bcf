"""The same search for every method: numbers drawn evenly over ranges, and then around the best of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Point", "Range", "Space", "around", "draw", "is_outside", "propose"]

ZOOM = 1 / 3  # of the width of a range, in logarithms
WIDE, NEAR = 0, 1  # seeds of the two sequences


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers between `low` and `high`, both positive, evenly in their logarithms."""

    low: float
    high: float

    def at(self, share: float) -> float:
        """Returns the number at a share, [0, 1], of the way from low to high."""
        return self.low * (self.high / self.low) ** share

    def around(self, value: float) -> "Range":
        """Returns a narrower range with the value in its middle, which may lie beyond this one."""
        half = (self.high / self.low) ** (ZOOM / 2)
        return Range(value / half, value * half)


Space = Mapping[str, Range]
Point = dict[str, float]


def propose(space: Space, tried: Sequence[Point], best: Point | None) -> Point:
    """Returns the next point: the first two and every second one from the whole space, the others around the best.

    It depends on the earlier trials alone, so that a search can be stopped anywhere and go on later.
    best: that of `tried`.
    """
    near = max(0, (len(tried) - 1) // 2)  # of those tried
    if best is None or len(tried) < 2 or len(tried) % 2:
        return draw(space, len(tried) - near + 1, WIDE)[-1]
    return draw(around(space, best), near + 1, NEAR)[-1]


def draw(space: Space, count: int, seed: int) -> list[Point]:
    """Returns points of a scrambled Sobol sequence: as even over all ranges together as so few points can be."""
    shares = torch.quasirandom.SobolEngine(len(space), scramble=True, seed=seed).draw(count, dtype=torch.float64)
    return [
        {name: axis.at(share) for (name, axis), share in zip(space.items(), row, strict=True)}
        for row in shares.tolist()
    ]


def around(space: Space, best: Point) -> Space:
    """Returns the space of a third of the width around a point: the best of the edge of a range has room beyond it."""
    return {name: axis.around(best[name]) for name, axis in space.items()}


def is_outside(space: Space, point: Point) -> list[str]:
    """Returns the names of the numbers that lie beyond their first range, to tell that it was too narrow."""
    return [name for name, axis in space.items() if not _between(axis, point[name])]


def _between(axis: Range, value: float) -> bool:
    return math.log(axis.low) <= math.log(value) <= math.log(axis.high)
