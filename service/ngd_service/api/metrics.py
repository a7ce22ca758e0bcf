"""/jobs/{id}/metrics, /statistics and /anatomy: columns, thinned out to the width of a screen, and the newest."""

from typing import Annotated

from fastapi import APIRouter, Query

from ngd_service.api.container import MAX_CURSOR, ContainerDep, FromStep, JobId, MaxPoints
from ngd_service.api.series import anatomy, curves, spans_for, statistics
from ngd_service.resources import Anatomy, Metrics, Statistics
from ngd_service.store.spans import Name, Wanted

__all__ = ["router"]

router = APIRouter(prefix="/api/v1/jobs/{job_id}", tags=["metrics"])

KINDS: tuple[Name, Name] = ("curves", "evaluations")
MAX_COLUMNS = 1_000
SPANS_OF_NEWEST = 4  # few, but not one: that could begin long before the first step asked for
Names = Annotated[
    str, Query(description='Comma-separated; "seconds" and "bytes_sent" stand for all of their parts; empty: all.')
]
ToStep = Annotated[int | None, Query(ge=0, le=MAX_CURSOR, description="Last step wanted; None: the newest.")]
Columns = Annotated[int, Query(ge=10, le=MAX_COLUMNS, description="Columns at most.")]
Width = Annotated[
    int,
    Query(
        ge=1,
        le=2**40,
        description="Steps that a column holds at least: with `span` and last column of an earlier answer, only the "
        "columns after it.",
    ),
]


@router.get("/metrics")
def get_metrics(
    container: ContainerDep,
    job_id: JobId,
    names: Names = "",
    from_step: FromStep = 0,
    to_step: ToStep = None,
    max_points: MaxPoints = 1000,
) -> Metrics:
    """Returns curves of a job; a name that it does not have is left out."""
    container.jobs.get(job_id)
    wanted = {name.strip() for name in names.split(",") if name.strip()}
    range_ = Wanted(from_step=from_step, to_step=to_step, most_steps=max_points, most_spans=spans_for(max_points))
    trained, tested = (container.store.spans(job_id, kind, range_) for kind in KINDS)
    series = curves(trained, wanted) | curves(tested, wanted)
    # The first of the two reads counts: the next call asks again for anything that came in between.
    return Metrics(series=series, last_step=max(trained.last_step or tested.last_step, from_step - 1))


@router.get("/statistics")
def get_statistics(
    container: ContainerDep,
    job_id: JobId,
    from_step: FromStep = 0,
    to_step: ToStep = None,
    max_points: Columns = 200,
    span: Width = 1,
    judged: Annotated[bool, Query(description="With the changes, noises and thresholds that decided.")] = False,
) -> Statistics:
    """Returns the age and the interval of each statistic, a row for each, a column for each span of steps."""
    container.jobs.get(job_id)
    started = container.store.newest_events(job_id, ["started"], 0, 1)
    names = started[0].data["statistics"] if started else []
    range_ = Wanted(from_step=from_step, to_step=to_step, most_steps=max_points, most_spans=max_points, width=span)
    known = container.store.spans(job_id, "statistics", range_)
    return statistics(names, known, with_judged=judged)


@router.get("/anatomy")
def get_anatomy(container: ContainerDep, job_id: JobId, from_step: FromStep = 0) -> Anatomy:
    """Returns the newest that was told of layers, factors and ranks, in this step or later ones."""
    container.jobs.get(job_id)
    started = container.store.newest_events(job_id, ["started"], 0, 1)
    known = container.store.spans(
        job_id, "newest", Wanted(from_step=from_step, most_steps=1, most_spans=SPANS_OF_NEWEST)
    )
    return anatomy(started[0].data if started else {}, known)
