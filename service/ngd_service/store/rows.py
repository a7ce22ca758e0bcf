"""Rows of the tables as the records of base.py, and the query of a job's newest events."""

from functools import lru_cache
from typing import Any

import sqlalchemy as sa

from ngd_service.job_state import Action, AttemptState, Desired, JobState, Phase
from ngd_service.store import tables as t
from ngd_service.store.base import AttemptRecord, EventRecord, JobRecord
from ngd_workers.contract.events import with_metrics
from ngd_workers.contract.rundir import Outcome
from ngd_workers.contract.spec import Target

__all__ = ["attempt_record", "event_record", "events_of", "job_record"]


def job_record(row: Any, failed_starts: int = 0, failed_starts_in_a_row: int = 0) -> JobRecord:
    """Returns the job. row: all columns of `jobs`; only the reconciler needs the failed starts, from `attempts`."""
    state = JobState(
        phase=Phase(row.phase),
        desired=Desired(row.desired),
        max_attempts=row.max_attempts,
        cancel_requested_at=row.cancel_requested_at,
        retry_at=row.retry_at,
        failed_starts=failed_starts,
        failed_starts_in_a_row=failed_starts_in_a_row,
    )
    return JobRecord(
        id=row.id,
        name=row.name,
        spec=_spec(row.spec),
        state=state,
        reason=row.reason,
        message=row.message,
        attempt=row.attempt,
        progress=row.progress,
        metrics_latest=row.metrics_latest,
        result=None if row.result is None else Outcome.model_validate_json(row.result),
        created_at=row.created_at,
        created_by=row.created_by,
        started_at=row.started_at,
        finished_at=row.finished_at,
        resource_version=row.resource_version,
    )


def attempt_record(row: Any) -> AttemptRecord:
    """Returns the attempt. row: all columns of `attempts`."""
    state = AttemptState(
        number=row.number,
        is_submitted=row.is_submitted,
        has_started=row.has_started,
        stop=Action(row.stop),
        stop_sent_at=row.stop_sent_at,
        created_at=row.created_at,
        last_seen_at=row.last_seen_at,
    )
    return AttemptRecord(row.id, row.job_id, state, row.acknowledged_seq, row.ended_at)


def event_record(row: Any) -> EventRecord:
    """Returns the event. row: all columns of `events`."""
    return EventRecord(row.id, row.job_id, row.attempt, row.seq, row.kind, row.time, with_metrics(row.data))


def _spec(stored: dict[str, Any]) -> dict[str, Any]:
    """Returns the spec with a target of version 0.1 in this version's form."""
    target = stored.get("target")
    if target is None or "metric" in target:
        return stored
    return stored | {"target": Target.model_validate(target).model_dump(mode="json")}


@lru_cache(maxsize=64)
def events_of(kinds: tuple[str, ...], *, newest: bool) -> sa.Executable:
    """Returns the query of a job's events of these kinds, or of all if there is none; the first or the last first.

    Its values: job_id, after, limit.
    """
    order = sa.desc if newest else sa.asc
    job_id: sa.BindParameter[str] = sa.bindparam("job_id")
    after, limit = (sa.bindparam(name, type_=sa.BigInteger) for name in ("after", "limit"))
    every = sa.select(t.events).where(t.events.c.job_id == job_id, t.events.c.id > after).limit(limit)
    every = every.order_by(order(t.events.c.id))
    if not kinds:
        return every
    by_kind = [every.where(t.events.c.kind == kind).subquery() for kind in kinds]  # an index has each in order
    return sa.union_all(*(sa.select(of_kind) for of_kind in by_kind)).order_by(order("id")).limit(limit)
