"""Pure: curves of a job from its stored steps and evaluations, thinned out so that nothing seen is lost."""

import math
from collections.abc import Collection, Sequence

from pydantic_core import from_json

from service.resources import Series, Statistics
from service.store.base import PointRecord

__all__ = ["curves", "statistics", "thin"]

SCALARS = (
    "loss",
    "accuracy",
    "lr",
    "momentum",
    "damping",
    "reduction_ratio",
    "samples_per_s",
    "epoch",
    "time_s",
    "failed_inversions",
    "skipped_steps",
)
GROUPS = ("seconds", "bytes_sent")
TESTED = ("test_loss", "test_accuracy")


def curves(
    steps: Sequence[PointRecord], evaluations: Sequence[PointRecord], names: Collection[str], max_points: int
) -> dict[str, Series]:
    """Returns the named curves, all if no name is given, each of at most about max_points points.

    The parts of a group have the same steps, so that they can be stacked: those that matter to their sum.
    """
    trained = [(point.step, from_json(point.json)) for point in steps]
    tested = [(point.step, from_json(point.json)) for point in evaluations]
    found: dict[str, Series] = {}
    for records, scalars in ((trained, SCALARS), (tested, TESTED)):
        for name in scalars:
            # Some steps lack some values: those of an earlier version, or of a setting that was not adapted.
            known = [(step, float(r[name])) for step, r in records if r.get(name) is not None]
            if known and _is_wanted(name, names):
                steps_known, values = zip(*known, strict=True)
                found[name] = thin(steps_known, values, max_points=max_points)
    for group in GROUPS:
        found |= _stack(group, [(step, record[group]) for step, record in trained], names, max_points)
    return found


def thin(steps: Sequence[int], values: Sequence[float], *, max_points: int) -> Series:
    """Returns the curve with the smallest, the largest and each non-finite end of every bucket; first and last stay."""
    indices = _kept(values, max_points)
    return Series(steps=[steps[i] for i in indices], values=[values[i] for i in indices])


def statistics(names: Sequence[str], steps: Sequence[PointRecord], max_points: int) -> Statistics:
    """Returns ages and intervals at the last step of each column, and how often each was refreshed within it."""
    num_columns = min(len(steps), max_points)
    ends = [len(steps) * (column + 1) // num_columns for column in range(num_columns)]
    result = Statistics(
        names=list(names),
        steps=[steps[end - 1].step for end in ends],
        ages=[[] for _ in names],
        intervals=[[] for _ in names],
        refreshes=[[] for _ in names],
        last_step=steps[-1].step if steps else 0,
    )
    start = 0
    for end in ends:
        records = [from_json(point.json) for point in steps[start:end]]
        for row in range(len(names)):
            result.ages[row].append(records[-1]["ages"][row])
            result.intervals[row].append(records[-1]["intervals"][row])
            result.refreshes[row].append(sum(record["ages"][row] == 0 for record in records))
        start = end
    return result


def _extremes(values: Sequence[float], indices: range) -> set[int]:
    """Returns where the bucket is lowest and highest; where it is not a number, that instead of one of the two."""
    finite = [i for i in indices if math.isfinite(values[i])]
    ends = {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)} if finite else set()
    lost = next((i for i in indices if not math.isfinite(values[i])), None)
    return ends if lost is None else {lost, *list(ends)[:1]}


def _stack(
    group: str, records: Sequence[tuple[int, dict[str, float]]], names: Collection[str], max_points: int
) -> dict[str, Series]:
    """Returns the wanted parts of a group; a part that a step lacks is 0 there."""
    parts = [
        part
        for part in dict.fromkeys(part for _, record in records for part in record)
        if _is_wanted(f"{group}.{part}", names) or group in names
    ]
    kept = [records[i] for i in _kept([sum(record.values()) for _, record in records], max_points)]
    steps = [step for step, _ in kept]
    return {
        f"{group}.{part}": Series(steps=steps, values=[float(record.get(part, 0.0)) for _, record in kept])
        for part in parts
    }


def _kept(values: Sequence[float], max_points: int) -> list[int]:
    if len(values) <= max_points:
        return list(range(len(values)))
    num_buckets = max(1, (max_points - 2) // 2)
    kept = {0, len(values) - 1}
    for bucket in range(num_buckets):
        start, end = (len(values) * (bucket + i) // num_buckets for i in (0, 1))
        kept |= _extremes(values, range(start, end))
    return sorted(kept)


def _is_wanted(name: str, names: Collection[str]) -> bool:
    return not names or name in names
