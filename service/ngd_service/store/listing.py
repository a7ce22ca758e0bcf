"""The list of jobs: filtered, sorted and paged in the database, at most three queries a page."""

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from ngd_service.job_state import ACTIVE, TERMINAL, Phase
from ngd_service.store import tables as t
from ngd_service.store.base import Cursor, JobQuery, Listed
from ngd_service.store.progress import TARGET
from ngd_service.store.rows import job_record

__all__ = ["list_jobs"]

# In the order of state: which phases, and whether the oldest job of them comes first, as in the queue.
SECTIONS: tuple[tuple[frozenset[Phase], bool], ...] = (
    (ACTIVE, False),
    (frozenset({Phase.QUEUED}), True),
    (TERMINAL, False),
)
SORTED_BY: Mapping[str, sa.ColumnElement[Any]] = {
    "name": t.jobs.c.name,
    "owner": t.jobs.c.created_by,
    "optimizer": t.jobs.c.spec["optimizer"]["kind"].as_string(),
    "lr": t.jobs.c.spec["optimizer"]["lr"].as_float(),
    "target_step": t.jobs.c.progress[TARGET]["step"].as_integer(),
    "target_s": t.jobs.c.progress[TARGET]["seconds"].as_float(),
}


def list_jobs(connection: sa.Connection, query: JobQuery, after: Cursor | None, limit: int) -> Listed:
    """Returns a page of the jobs that the query asks for, and where the next page begins."""
    rows: Sequence[Any]
    if query.order == "state":
        rows = _by_state(connection, query, after, limit + 1)
    elif query.order == "created":
        page = _filtered(query, after, is_oldest_first=not query.is_descending, phases=query.phases)
        rows = connection.execute(page.limit(limit + 1)).all()
    else:
        rows = _by_value(connection, query, after, limit + 1)
    jobs = [job_record(row) for row in rows[:limit]]
    return Listed(jobs, (getattr(rows[limit - 1], "place", None), jobs[-1].id) if len(rows) > limit else None)


def _by_state(connection: sa.Connection, query: JobQuery, after: Cursor | None, limit: int) -> list[Any]:
    """Returns the rows section by section, where an index gives the jobs of each phase in order."""
    rows: list[Any] = []
    first = 0 if after is None else int(after[0])
    for place, (phases, is_oldest_first) in enumerate(SECTIONS[first:], start=first):
        wanted = phases & set(query.phases) if query.phases else phases
        left = limit - len(rows)
        if not wanted or left == 0:
            continue
        order = t.jobs.c.id.asc() if is_oldest_first else t.jobs.c.id.desc()
        start = after if place == first else None
        of_phase = [
            sa.select(
                _filtered(query, start, is_oldest_first=is_oldest_first, phases=[phase]).limit(left).subquery().c.id
            )
            for phase in sorted(wanted)
        ]
        page = sa.select(t.jobs, sa.literal(place).label("place")).where(t.jobs.c.id.in_(sa.union_all(*of_phase)))
        rows += connection.execute(page.order_by(order).limit(left)).all()
    return rows


def _by_value(connection: sa.Connection, query: JobQuery, after: Cursor | None, limit: int) -> Sequence[Any]:
    """Returns the rows by a value of theirs, those without one last, and among equals the newest first."""
    value, job_id = SORTED_BY[query.order], t.jobs.c.id
    page = sa.select(t.jobs, value.label("place")).where(*_conditions(query, query.phases))
    if after is not None:
        start, last_id = after
        if start is None:
            page = page.where(value.is_(None), job_id < last_id)
        else:
            is_beyond = value < start if query.is_descending else value > start
            page = page.where(is_beyond | ((value == start) & (job_id < last_id)) | value.is_(None))
    order = value.desc() if query.is_descending else value.asc()
    return connection.execute(page.order_by(value.is_(None), order, job_id.desc()).limit(limit)).all()


def _filtered(
    query: JobQuery, after: Cursor | None, *, is_oldest_first: bool, phases: Sequence[Phase]
) -> sa.Select[Any]:
    job_id = t.jobs.c.id
    page = sa.select(t.jobs).where(*_conditions(query, phases))
    if after is not None:
        page = page.where(job_id > after[1] if is_oldest_first else job_id < after[1])
    return page.order_by(job_id.asc() if is_oldest_first else job_id.desc())


def _conditions(query: JobQuery, phases: Sequence[Phase]) -> list[sa.ColumnElement[bool]]:
    jobs = t.jobs.c
    conditions: list[sa.ColumnElement[bool]] = [jobs.phase.in_(phases)] if phases else []
    if query.text:
        conditions.append(
            jobs.name.icontains(query.text, autoescape=True) | jobs.id.icontains(query.text, autoescape=True)
        )
    if query.optimizers:
        conditions.append(SORTED_BY["optimizer"].in_(query.optimizers))
    if query.owners:
        conditions.append(jobs.created_by.in_(query.owners))
    for name, value in query.labels:
        label = jobs.spec["labels"][name].as_string()
        conditions.append(label.is_not(None) if value is None else label == value)
    return conditions
