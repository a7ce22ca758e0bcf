"""Pure: ranges of steps, as sorted lists [first, last] that neither touch nor overlap."""

from collections.abc import Sequence

__all__ = ["add_range", "gaps", "remove_ranges"]

Ranges = list[list[int]]


def add_range(ranges: Ranges, first: int, last: int) -> Ranges:
    """Returns the ranges with first..last too; with none more if last comes before first."""
    if last < first:
        return ranges
    apart = [one for one in ranges if one[1] < first - 1 or one[0] > last + 1]
    joined = [one for one in ranges if one not in apart]
    merged = [min([first, *(one[0] for one in joined)]), max([last, *(one[1] for one in joined)])]
    return sorted([*apart, merged])


def gaps(before: int, steps: Sequence[int]) -> Ranges:
    """Returns what ascending steps pass over, the first of them after the step `before`."""
    pairs = zip([before, *steps], steps, strict=False)
    return [[one + 1, following - 1] for one, following in pairs if following > one + 1]


def remove_ranges(ranges: Ranges, steps: Sequence[int]) -> Ranges:
    """Returns the ranges without these ascending steps."""
    if not ranges or not steps:
        return ranges
    for step in steps:
        cut = [[one[0], min(one[1], step - 1)] for one in ranges if one[0] <= step <= one[1]]
        cut += [[max(one[0], step + 1), one[1]] for one in ranges if one[0] <= step <= one[1]]
        ranges = [one for one in ranges if not one[0] <= step <= one[1]] + [one for one in cut if one[0] <= one[1]]
    return sorted(ranges)
