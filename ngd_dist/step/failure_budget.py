"""Failed inversions of a run, counted from reports that every rank has alike, so that all stop together or none."""

from collections.abc import Mapping

from ngd_dist.distributed import Report
from ngd_dist.errors import InversionError
from ngd_dist.inversion import Ending
from ngd_dist.statistics.statistic import Key

__all__ = ["count", "error_beyond"]


def count(before: int, reports: Mapping[Key, Report]) -> int:
    """Returns the failures of the whole run, from those before this step and this step's reports."""
    return before + sum(report.ending is not Ending.OK for report in reports.values())


def error_beyond(bound: int | None, before: int, reports: Mapping[Key, Report]) -> InversionError | None:
    """Returns what to raise if this step's failures exceed the bound; it names the first of them."""
    failures = count(before, reports)
    if bound is None or failures == before or failures <= bound:
        return None
    key, report = next((key, report) for key, report in reports.items() if report.ending is not Ending.OK)
    return InversionError(
        f"{failures} inversions have failed, of which max_failed_inversions allows {bound}; the last was that of "
        f"{key}, {report.ending.name}: {report.ending.advice}. The weights are as they were before this step"
    )
