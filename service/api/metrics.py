"""/jobs/{id}/metrics and /statistics: columns, thinned out to what a screen can show."""

from typing import Annotated

from fastapi import APIRouter, Query

from service.api.parts import FromStep, JobId, MaxPoints, PartsDep
from service.resources import Metrics, Statistics
from service.series import curves, statistics

__all__ = ["router"]

router = APIRouter(prefix="/api/v1/jobs/{job_id}", tags=["metrics"])

Names = Annotated[
    str, Query(description='Comma-separated; "seconds" and "bytes_sent" stand for all of their parts; empty: all.')
]


@router.get("/metrics")
def get_metrics(
    parts: PartsDep, job_id: JobId, names: Names = "", from_step: FromStep = 0, max_points: MaxPoints = 1000
) -> Metrics:
    """Returns curves of a job; a name that it does not have is left out."""
    parts.jobs.get(job_id)
    wanted = {name.strip() for name in names.split(",") if name.strip()}
    steps, evaluations = parts.store.steps(job_id, from_step), parts.store.evaluations(job_id, from_step)
    last_step = max((points[-1].step for points in (steps, evaluations) if points), default=max(from_step - 1, 0))
    return Metrics(series=curves(steps, evaluations, wanted, max_points), last_step=last_step)


@router.get("/statistics")
def get_statistics(parts: PartsDep, job_id: JobId, from_step: FromStep = 0, max_points: MaxPoints = 200) -> Statistics:
    """Returns the age and the interval of each statistic, a row for each, a column for each span of steps."""
    parts.jobs.get(job_id)
    started = parts.store.newest_event(job_id, "started")
    names = started.data["statistics"] if started else []
    return statistics(names, parts.store.steps(job_id, from_step), max_points)
