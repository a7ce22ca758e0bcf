"""The jobs that a controller may take under its lease, and the changes that need the lease."""

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from ngd_service.job_state import ACTIVE, Desired, Phase
from ngd_service.store import tables as t
from ngd_service.store.base import Claim, Queue
from ngd_service.store.progress import WAITS_FOR

__all__ = [
    "change_leased",
    "failed_starts",
    "is_alone",
    "is_free",
    "needs_a_look",
    "num_given_back",
    "num_taken",
    "queue",
]

CLAIMING = 0x6E6764_0002  # PostgreSQL's number for the lock: "ngd", 2


def is_free(now: datetime) -> sa.ColumnElement[bool]:
    """Jobs on which no controller holds a lease."""
    return t.jobs.c.lease_token.is_(None) | (t.jobs.c.lease_expires_at < now)


def is_alone(connection: sa.Connection) -> bool:
    """Returns whether no other controller is claiming now: two that count the free slots at once would both fill them.

    Does not block: if another controller holds the lock, or hangs, this one tries again on its next tick.
    """
    if connection.dialect.name != "postgresql":
        return True  # SQLite has one writer
    return bool(connection.execute(sa.select(sa.func.pg_try_advisory_xact_lock(CLAIMING))).scalar_one())


def num_taken(connection: sa.Connection, now: datetime) -> int:
    """Slots held: by active jobs, and by waiting ones that another claim is about to start."""
    is_starting = (t.jobs.c.phase == Phase.QUEUED) & ~is_free(now)
    query = sa.select(sa.func.count()).select_from(t.jobs).where(t.jobs.c.phase.in_(ACTIVE) | is_starting)
    return int(connection.execute(query).scalar_one())


def num_given_back(connection: sa.Connection, max_running: int) -> int:
    """Slots of active jobs whose drivers wait for CPUs: as many as there are, since each of these is a process too."""
    is_short = (t.jobs.c.phase == Phase.STARTING) & t.jobs.c.progress[WAITS_FOR].as_string().is_not(None)
    query = sa.select(sa.func.count()).select_from(t.jobs).where(is_short)
    return min(int(connection.execute(query).scalar_one()), max_running)


def failed_starts(connection: sa.Connection, job_ids: Collection[str]) -> dict[str, tuple[int, int]]:
    """Returns how many ended attempts of each job never had workers that reported: in all, and the last in a row."""
    ended = sa.select(t.attempts.c.job_id, t.attempts.c.has_started)
    ended = ended.where(t.attempts.c.job_id.in_(job_ids), t.attempts.c.ended_at.is_not(None))
    failures: dict[str, tuple[int, int]] = {}
    for job_id, has_started in connection.execute(ended.order_by(t.attempts.c.number)):
        total, in_a_row = failures.get(job_id, (0, 0))
        failures[job_id] = (total, 0) if has_started else (total + 1, in_a_row + 1)
    return failures


def needs_a_look(slots: int) -> sa.ColumnElement[bool]:
    """Active jobs, cancelled waiting ones, and of the waiting ones the oldest that fit into the free slots."""
    is_waiting = t.jobs.c.phase == Phase.QUEUED
    is_next = t.jobs.c.id.in_(sa.select(_oldest_waiting().limit(max(slots, 0)).subquery().c.id))
    return t.jobs.c.phase.in_(ACTIVE) | (is_waiting & (t.jobs.c.desired == Desired.CANCELLED)) | is_next


def queue(connection: sa.Connection, job_ids: Collection[str]) -> Queue:
    """Returns the places of these jobs among the waiting ones, and the number of active ones; no row for the others."""
    waiting = _oldest_waiting().order_by(None).subquery()
    number = sa.func.row_number().over(order_by=waiting.c.id).label("number")
    numbered = sa.select(waiting.c.id, number).subquery()
    places = sa.select(numbered.c.id, numbered.c.number).where(numbered.c.id.in_(job_ids))
    active = sa.select(sa.func.count()).select_from(t.jobs).where(t.jobs.c.phase.in_(ACTIVE)).scalar_subquery()
    counts = connection.execute(
        sa.select(sa.select(sa.func.count()).select_from(waiting).scalar_subquery(), active)
    ).one()
    return Queue({row.id: row.number for row in connection.execute(places)}, *map(int, counts))


def _oldest_waiting() -> sa.Select[tuple[str]]:
    is_waiting = (t.jobs.c.phase == Phase.QUEUED) & (t.jobs.c.desired == Desired.RUNNING)
    return sa.select(t.jobs.c.id).where(is_waiting).order_by(t.jobs.c.id)


def change_leased(connection: sa.Connection, claim: Claim, change: Mapping[str, Any]) -> bool:
    """Changes the job's row. Returns False, and changes nothing, if this controller has lost the lease."""
    mine = (t.jobs.c.id == claim.job.id) & (t.jobs.c.lease_token == claim.lease_token)
    return connection.execute(sa.update(t.jobs).where(mine).values(**change)).rowcount == 1
