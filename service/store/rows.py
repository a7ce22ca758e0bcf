"""Rows of the tables as the records of base.py."""

from typing import Any

from service.job_state import Action, AttemptState, Desired, JobState, Phase
from service.store.base import AttemptRecord, EventRecord, JobRecord
from workers.rundir import Outcome

__all__ = ["attempt_record", "event_record", "job_record"]


def job_record(row: Any) -> JobRecord:
    state = JobState(
        phase=Phase(row.phase),
        desired=Desired(row.desired),
        max_attempts=row.max_attempts,
        cancel_requested_at=row.cancel_requested_at,
        retry_at=row.retry_at,
    )
    return JobRecord(
        id=row.id,
        name=row.name,
        spec=row.spec,
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
    return EventRecord(row.id, row.job_id, row.attempt, row.seq, row.kind, row.time, row.data)
