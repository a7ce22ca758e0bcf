"""What one delivery of an attempt's events changes, within a transaction that sql.py has begun."""

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from ngd_service.errors import NotFoundError, StaleAttemptError
from ngd_service.job_state import Desired
from ngd_service.store import tables as t
from ngd_service.store.base import Ingested
from ngd_service.store.engine import INSERT
from ngd_service.store.progress import JobProgress, advance, newly_lost, summary
from ngd_service.store.thinning import catch_up, thin
from ngd_workers.contract.events import Evaluation, Numbered, Steps

__all__ = ["ingest"]

log = logging.getLogger(__name__)


def ingest(connection: sa.Connection, attempt_id: str, delivered: Sequence[Numbered], *, is_late: bool) -> Ingested:
    """Returns what to answer. Only events whose seq is not there yet have an effect, so a replay has none."""
    attempt, job = _lock(connection, attempt_id)
    if not is_late and (attempt.ended_at is not None or attempt.number != job.attempt):
        raise StaleAttemptError(f"attempt {attempt.number} of {job.id} has ended; its reports no longer count")
    is_thinned = (attempt.thinned_seq or 0) >= attempt.acknowledged_seq
    fresh = _unseen(connection, attempt_id, delivered)
    if fresh:
        _insert_events(connection, attempt, fresh)
        _insert_points(connection, attempt, fresh)
        _advance_job(connection, job, attempt, fresh)
    acknowledged = _acknowledged(connection, attempt)
    has_started = attempt.has_started or any(numbered.event.kind == "started" for numbered in fresh)
    change: dict[str, Any] = {"acknowledged_seq": acknowledged, "has_started": has_started}
    if not is_late:  # nothing was heard of it: these are words from before
        change["last_seen_at"] = datetime.now(UTC)
    if is_thinned:
        change |= {"thinned_seq": acknowledged}
    connection.execute(sa.update(t.attempts).where(t.attempts.c.id == attempt_id).values(change))
    if not is_thinned:
        catch_up(connection, attempt.job_id)
    return Ingested(Desired(job.desired), acknowledged, len(fresh))


def _lock(connection: sa.Connection, attempt_id: str) -> tuple[Any, Any]:
    owner = sa.select(t.attempts.c.job_id).where(t.attempts.c.id == attempt_id).scalar_subquery()
    job = connection.execute(sa.select(t.jobs).where(t.jobs.c.id == owner).with_for_update()).one_or_none()
    if job is None:
        raise NotFoundError(f"there is no attempt {attempt_id!r}")
    attempt = connection.execute(sa.select(t.attempts).where(t.attempts.c.id == attempt_id)).one()
    return attempt, job


def _unseen(connection: sa.Connection, attempt_id: str, delivered: Sequence[Numbered]) -> list[Numbered]:
    if not delivered:
        return []
    of_seq = {numbered.seq: numbered for numbered in delivered}
    within = t.events.c.seq.between(min(of_seq), max(of_seq))
    query = sa.select(t.events.c.seq).where(t.events.c.attempt_id == attempt_id, within)
    seen = set(connection.execute(query).scalars())
    return [of_seq[seq] for seq in sorted(of_seq.keys() - seen)]


def _insert_events(connection: sa.Connection, attempt: Any, fresh: Sequence[Numbered]) -> None:
    rows = [
        {
            "job_id": attempt.job_id,
            "attempt_id": attempt.id,
            "attempt": attempt.number,
            "seq": numbered.seq,
            "kind": numbered.event.kind,
            "time": datetime.fromtimestamp(numbered.time_s, UTC),
            "data": summary(numbered),
        }
        for numbered in fresh
    ]
    connection.execute(sa.insert(t.events), rows)


def _insert_points(connection: sa.Connection, attempt: Any, fresh: Sequence[Numbered]) -> None:
    """Of two values for a step that of the later attempt stands, then of the later event, however they come in."""
    points: dict[sa.Table, dict[int, dict[str, Any]]] = {t.steps: {}, t.evaluations: {}}
    for numbered in fresh:
        where = {"job_id": attempt.job_id, "attempt": attempt.number, "seq": numbered.seq}
        match numbered.event:
            case Steps(records=records):
                for record in records:
                    points[t.steps][record.step] = where | {"step": record.step, "json": record.model_dump_json()}
            case Evaluation() as done:
                points[t.evaluations][done.step] = where | {"step": done.step, "json": done.model_dump_json()}
    for table, of_step in points.items():
        _upsert(connection, table, list(of_step.values()))
        thin(connection, attempt.job_id, table, of_step.keys())


def _upsert(connection: sa.Connection, table: sa.Table, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    insert = INSERT[connection.dialect.name](table)
    new = insert.excluded
    is_later = (new.attempt > table.c.attempt) | ((new.attempt == table.c.attempt) & (new.seq > table.c.seq))
    change = {"attempt": new.attempt, "seq": new.seq, "json": new.json}
    upsert = insert.on_conflict_do_update(index_elements=["job_id", "step"], set_=change, where=is_later)
    connection.execute(upsert, rows)


def _advance_job(connection: sa.Connection, job: Any, attempt: Any, fresh: Sequence[Numbered]) -> None:
    status = JobProgress(job.progress, job.metrics_latest)
    for place, numbered in enumerate(fresh, start=attempt.acknowledged_seq + 1):
        before, status = status, advance(status, numbered, is_in_order=numbered.seq == place)
        for first, last in newly_lost(before, status, numbered):
            _insert_loss(connection, attempt, first, last)
    change = {
        "progress": dict(status.progress),
        "metrics_latest": dict(status.metrics),
        "resource_version": t.jobs.c.resource_version + 1,
    }
    connection.execute(sa.update(t.jobs).where(t.jobs.c.id == job.id).values(change))


def _insert_loss(connection: sa.Connection, attempt: Any, first: int, last: int) -> None:
    log.warning("steps_lost attempt=%s first_step=%d last_step=%d", attempt.id, first, last)
    why = "they were done, and no record of them has arrived"
    row = {
        "job_id": attempt.job_id,
        "attempt": attempt.number,
        "kind": "steps_lost",
        "time": datetime.now(UTC),
        "data": {"first_step": first, "last_step": last, "message": why},
    }
    connection.execute(sa.insert(t.events).values(row))


def _acknowledged(connection: sa.Connection, attempt: Any) -> int:
    """Returns the last seq up to which none is missing."""
    query = sa.select(t.events.c.seq).where(
        t.events.c.attempt_id == attempt.id, t.events.c.seq > attempt.acknowledged_seq
    )
    acknowledged = int(attempt.acknowledged_seq)
    for seq in connection.execute(query.order_by(t.events.c.seq)).scalars():
        if seq != acknowledged + 1:
            break
        acknowledged = seq
    return acknowledged
