"""Which jobs a controller may take under its lease, and what it may change only while it holds it."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from service.job_state import ACTIVE, Desired, Phase
from service.store import tables as t
from service.store.base import Claim, Queue

__all__ = ["change_leased", "is_alone", "is_free", "needs_a_look", "num_taken", "queue"]

CLAIMING = 0x6E6764_0002  # PostgreSQL's number for the lock: "ngd", 2


def is_free(now: datetime) -> sa.ColumnElement[bool]:
    return t.jobs.c.lease_token.is_(None) | (t.jobs.c.lease_expires_at < now)


def is_alone(connection: sa.Connection) -> bool:
    """Returns whether no other controller is claiming now: two that count the free slots at once would both fill them.

    The other one is not waited for: the next tick comes soon, and what has hung is not to hang this one.
    """
    if connection.dialect.name != "postgresql":
        return True  # SQLite has one writer
    return bool(connection.execute(sa.select(sa.func.pg_try_advisory_xact_lock(CLAIMING))).scalar_one())


def num_taken(connection: sa.Connection, now: datetime) -> int:
    """Slots held: by active jobs, and by waiting ones that another claim is about to start."""
    is_starting = (t.jobs.c.phase == Phase.QUEUED) & ~is_free(now)
    query = sa.select(sa.func.count()).select_from(t.jobs).where(t.jobs.c.phase.in_(ACTIVE) | is_starting)
    return int(connection.execute(query).scalar_one())


def needs_a_look(slots: int) -> sa.ColumnElement[bool]:
    """Active jobs, cancelled waiting ones, and of the waiting ones the oldest that fit into the free slots."""
    is_waiting = t.jobs.c.phase == Phase.QUEUED
    is_next = t.jobs.c.id.in_(sa.select(_oldest_waiting().limit(max(slots, 0)).subquery().c.id))
    return t.jobs.c.phase.in_(ACTIVE) | (is_waiting & (t.jobs.c.desired == Desired.CANCELLED)) | is_next


def queue(connection: sa.Connection) -> Queue:
    ids = [row.id for row in connection.execute(_oldest_waiting())]
    active = sa.select(sa.func.count()).select_from(t.jobs).where(t.jobs.c.phase.in_(ACTIVE))
    return Queue(ids, int(connection.execute(active).scalar_one()))


def _oldest_waiting() -> sa.Select[tuple[str]]:
    is_waiting = (t.jobs.c.phase == Phase.QUEUED) & (t.jobs.c.desired == Desired.RUNNING)
    return sa.select(t.jobs.c.id).where(is_waiting).order_by(t.jobs.c.id)


def change_leased(connection: sa.Connection, claim: Claim, change: Mapping[str, Any]) -> bool:
    mine = (t.jobs.c.id == claim.job.id) & (t.jobs.c.lease_token == claim.lease_token)
    return connection.execute(sa.update(t.jobs).where(mine).values(**change)).rowcount == 1
