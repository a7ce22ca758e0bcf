"""Spans of a job's steps: kept up to date by the transaction that stores the steps, and read by the level that fits.

Each span is computed again from the spans or steps below it, so that steps redone by a later attempt, and steps that
come late, are right in all levels. `attempts.thinned_seq` says up to which event that is done: versions before this one
store steps without it, and theirs are thinned as soon as this one meets them.
"""

import logging
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from typing import Any

import sqlalchemy as sa
from pydantic_core import from_json, to_json

from ngd_service.store import tables as t
from ngd_service.store.engine import INSERT
from ngd_service.store.spans import KINDS, LOWEST, WIDENING, Kind, Name, Span, Spans, Wanted, fold, ladder, level_for

__all__ = ["catch_up", "is_behind", "read", "thin"]

log = logging.getLogger(__name__)

RECORDS: dict[Name, sa.Table] = {
    "curves": t.steps,
    "statistics": t.steps,
    "newest": t.steps,
    "evaluations": t.evaluations,
}
SPANS_AT_ONCE = 64  # of the lowest level: 512 steps, a full batch of a worker
EVENTS_AT_ONCE = 20  # a transaction of seconds at most
MOST_RECORDS = 2_000  # that a reader may fold by itself: beyond it the lowest level has spans enough for a screen


def thin(connection: sa.Connection, job_id: str, table: sa.Table, steps: Collection[int]) -> None:
    """Brings the spans that hold these steps up to date; their records are stored already."""
    if not steps:
        return
    newest = _last_step(connection, table, job_id)
    for kind in (kind for kind, source in RECORDS.items() if source is table):
        for first, last in _runs(sorted({(step - 1) >> LOWEST for step in steps})):
            _thin_run(connection, job_id, kind, first, last, ladder(newest))


def is_behind(connection: sa.Connection, job_id: str) -> bool:
    """Returns whether a version without spans has stored steps of this job that are not thinned yet."""
    return _next_behind(connection, job_id) is not None


def catch_up(connection: sa.Connection, job_id: str | None) -> bool:
    """Thins some of what a version without spans has stored, of this job or of any; returns whether there was any."""
    behind = _next_behind(connection, job_id)
    if behind is None:
        return False
    connection.execute(sa.select(t.jobs.c.id).where(t.jobs.c.id == behind.job_id).with_for_update())
    attempt = connection.execute(sa.select(t.attempts).where(t.attempts.c.id == behind.id)).one()
    if attempt.thinned_seq is None:
        log.info("thinning_begins attempt_id=%s num_events=%d", attempt.id, attempt.acknowledged_seq)
    query = sa.select(t.events.c.seq, t.events.c.kind, t.events.c.data).where(
        t.events.c.attempt_id == attempt.id,
        t.events.c.seq > (attempt.thinned_seq or 0),
        t.events.c.seq <= attempt.acknowledged_seq,
    )
    rows = connection.execute(query.order_by(t.events.c.seq).limit(EVENTS_AT_ONCE)).all()
    for row in rows:
        if row.kind == "steps" and row.data:
            between = t.steps.c.step.between(row.data["first_step"], row.data["last_step"])
            stored = sa.select(t.steps.c.step).where(t.steps.c.job_id == attempt.job_id, between)
            thin(connection, attempt.job_id, t.steps, connection.execute(stored).scalars().all())
        elif row.kind == "evaluation":
            thin(connection, attempt.job_id, t.evaluations, [row.data["step"]])
    thinned = rows[-1].seq if rows else attempt.acknowledged_seq
    connection.execute(sa.update(t.attempts).where(t.attempts.c.id == attempt.id).values(thinned_seq=thinned))
    return True


def read(connection: sa.Connection, job_id: str, name: Name, wanted: Wanted) -> Spans:
    """Returns what `Store.spans` says."""
    kind, table = KINDS[name], RECORDS[name]
    first, last = max(wanted.from_step, 1), _last_step(connection, table, job_id, wanted.to_step)
    if last < first:
        return Spans(wanted.width, last, [])
    most = wanted.most_steps
    is_short = wanted.width == 1 and _num_records(connection, table, job_id, first, last, most) <= most
    level = 0 if is_short else level_for(first, last, wanted.most_spans, wanted.width)
    begin = ((first - 1) >> level << level) + 1
    budget = max(most, MOST_RECORDS)
    if _num_records(connection, table, job_id, begin, last, budget) <= budget:
        records = _records(connection, table, kind, job_id, begin, last)
        return Spans(1 << level, last, fold(kind, records, level), (records[0], records[-1]) if level else ())
    level = max(level, LOWEST)
    kept = max(step for step in ladder(last) if step <= level)
    number = t.spans.c.number.between((begin - 1) >> kept, (last - 1) >> kept)
    of_level = (*_of(job_id, name), t.spans.c.level == kept, number)
    query = sa.select(t.spans.c.last_step, t.spans.c.json).where(*of_level).order_by(t.spans.c.number)
    spans = [Span(row.last_step, from_json(row.json)) for row in connection.execute(query)]
    ends = [*_end(connection, table, kind, job_id, first), *_records(connection, table, kind, job_id, last, last)]
    return Spans(1 << level, last, fold(kind, spans, level), tuple(ends))


def _next_behind(connection: sa.Connection, job_id: str | None) -> Any:
    is_behind = sa.func.coalesce(t.attempts.c.thinned_seq, 0) < t.attempts.c.acknowledged_seq
    query = sa.select(t.attempts.c.id, t.attempts.c.job_id).where(is_behind).limit(1)
    return connection.execute(query if job_id is None else query.where(t.attempts.c.job_id == job_id)).first()


def _of(job_id: str, name: Name) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    return t.spans.c.job_id == job_id, t.spans.c.kind == name


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yields the first and the last of numbers that follow each other, at most SPANS_AT_ONCE at once."""
    first = previous = numbers[0]
    for number in numbers[1:]:
        if number != previous + 1 or number - first == SPANS_AT_ONCE:
            yield first, previous
            first = number
        previous = number
    yield first, previous


def _thin_run(connection: sa.Connection, job_id: str, name: Name, first: int, last: int, levels: Sequence[int]) -> None:
    """Makes the spans `first` to `last` of the lowest level again, and those above that hold them."""
    kind = KINDS[name]
    begin, end = (first << LOWEST) + 1, (last + 1) << LOWEST
    made = fold(kind, _records(connection, RECORDS[name], kind, job_id, begin, end), LOWEST)
    neighbours = _children(connection, job_id, name, begin, end, levels)
    rows = []
    for level in levels:
        if level > LOWEST:
            beside = {(span.last_step - 1) >> (level - WIDENING): span for span in neighbours[level - WIDENING]}
            beside |= {(span.last_step - 1) >> (level - WIDENING): span for span in made}
            made = fold(kind, [span for _, span in sorted(beside.items())], level)
        rows += [_row(job_id, name, level, span) for span in made if span.content]
    if rows:
        insert = INSERT[connection.dialect.name](t.spans)
        change = {"last_step": insert.excluded.last_step, "json": insert.excluded.json}
        connection.execute(insert.on_conflict_do_update(index_elements=list(t.spans.primary_key), set_=change), rows)


def _children(
    connection: sa.Connection, job_id: str, name: Name, begin: int, end: int, levels: Sequence[int]
) -> dict[int, list[Span]]:
    """Returns, by level, what the spans above these steps are made of, as it is stored."""
    children: dict[int, list[Span]] = {level: [] for level in levels}
    within = []
    for level, above in pairwise(levels):
        numbers = ((begin - 1) >> above) << WIDENING, (((end - 1) >> above) << WIDENING) + 3
        within.append((t.spans.c.level == level) & t.spans.c.number.between(*numbers))
    if within:
        query = sa.select(t.spans).where(*_of(job_id, name), sa.or_(*within))
        for row in connection.execute(query):
            children[row.level].append(Span(row.last_step, from_json(row.json)))
    return children


def _row(job_id: str, name: Name, level: int, span: Span) -> dict[str, Any]:
    return {
        "job_id": job_id,
        "kind": name,
        "level": level,
        "number": (span.last_step - 1) >> level,
        "last_step": span.last_step,
        "json": to_json(span.content, inf_nan_mode="strings").decode(),
    }


def _last_step(connection: sa.Connection, table: sa.Table, job_id: str, to_step: int | None = None) -> int:
    query = sa.select(sa.func.max(table.c.step)).where(table.c.job_id == job_id)
    newest = connection.execute(query if to_step is None else query.where(table.c.step <= to_step)).scalar_one()
    return newest or 0


def _num_records(connection: sa.Connection, table: sa.Table, job_id: str, first: int, last: int, most: int) -> int:
    """Returns how many records there are of these steps, counted no further than one more than `most`."""
    if last - first < most:
        return last - first + 1  # at most: some may be missing
    counted = sa.select(table.c.step).where(table.c.job_id == job_id, table.c.step.between(first, last)).limit(most + 1)
    return int(connection.execute(sa.select(sa.func.count()).select_from(counted.subquery())).scalar_one())


def _records(connection: sa.Connection, table: sa.Table, kind: Kind, job_id: str, first: int, last: int) -> list[Span]:
    """Returns the records of these steps, each as a span of one step."""
    query = sa.select(table.c.step, table.c.json).where(table.c.job_id == job_id, table.c.step.between(first, last))
    return [
        Span(row.step, kind.of_record(from_json(row.json))) for row in connection.execute(query.order_by(table.c.step))
    ]


def _end(connection: sa.Connection, table: sa.Table, kind: Kind, job_id: str, first: int) -> list[Span]:
    """Returns the first record from this step on."""
    step = sa.select(sa.func.min(table.c.step)).where(table.c.job_id == job_id, table.c.step >= first)
    first_stored = connection.execute(step).scalar_one()
    if first_stored is None:
        return []
    return _records(connection, table, kind, job_id, first_stored, first_stored)
