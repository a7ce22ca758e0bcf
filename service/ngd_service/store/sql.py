"""The store on SQLite and PostgreSQL. With the other modules of this folder, the only one that knows SQL.

SQLite: one writer at a time (BEGIN IMMEDIATE), readers beside it (WAL). PostgreSQL: a writer of a job's events
locks the job's row first, so that within a job event ids are committed in order and a cursor never skips one.
"""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from alembic.util import CommandError
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from ngd_service.errors import IdempotencyError, StartupError, StoreUnavailableError
from ngd_service.job_state import TERMINAL, Action, Decision, Desired, Phase
from ngd_service.store import tables as t
from ngd_service.store.base import (
    AttemptRecord,
    Claim,
    Cursor,
    EventRecord,
    Ingested,
    JobCounts,
    JobQuery,
    JobRecord,
    KeyedRequest,
    Listed,
    Queue,
    attempt_id,
)
from ngd_service.store.engine import INSERT, READ_ONLY, describe, open_engine, reported
from ngd_service.store.ingest import ingest
from ngd_service.store.job_counts import job_counts
from ngd_service.store.leases import (
    change_leased,
    failed_starts,
    is_alone,
    is_free,
    needs_a_look,
    num_given_back,
    num_taken,
    queue,
)
from ngd_service.store.listing import list_jobs
from ngd_service.store.progress import WAITS_FOR
from ngd_service.store.rows import attempt_record, event_record, events_of, job_record
from ngd_service.store.schema import is_usable, revision, upgrade
from ngd_service.store.spans import Name, Spans, Wanted
from ngd_service.store.thinning import catch_up, is_behind, read
from ngd_workers.contract.events import Numbered
from ngd_workers.contract.rundir import Outcome

__all__ = ["SQLStore"]

log = logging.getLogger(__name__)

KEY_LIFETIME = timedelta(hours=24)


class SQLStore:
    """A `Store` in a database; safe to share between threads."""

    def __init__(self, url: str) -> None:
        """Opens the database and brings its schema up to date. Raises: StartupError with one sentence."""
        self._writers = open_engine(url)
        self._readers = self._writers.execution_options(**{READ_ONLY: True})
        try:
            with self._writers.begin() as connection:
                upgrade(connection)
            self._catch_up()
        except (DBAPIError, CommandError) as error:
            self.close()
            raise StartupError(self._why_closed(error)) from error

    def _why_closed(self, error: DBAPIError | CommandError) -> str:
        if isinstance(error, CommandError):
            return (
                f"the database {self.shown_url} is of another version of ngd-dist ({error}); start the version that "
                "made it, or a newer one, or give this one another with NGD_DATABASE_URL"
            )
        return (
            f"can't open the database {self.shown_url}: {describe(error)}; check NGD_DATABASE_URL, or NGD_HOME for "
            "the default file, and that this user may write there"
        )

    @property
    def shown_url(self) -> str:
        """The database's address without the password."""
        return self._writers.url.render_as_string(hide_password=True)

    def bind(self, installation_id: str, home: str) -> None:
        """Makes the database this installation's for good: jobs' processes and folders are looked for in its home.

        Raises: StartupError if it is another's, which would take this one's silence for the death of its jobs.
        """
        mine = {"number": 1, "id": installation_id, "home": home}
        with self._write() as connection:
            insert = INSERT[connection.dialect.name](t.installation).values(mine)
            connection.execute(insert.on_conflict_do_nothing())
            owner = connection.execute(sa.select(t.installation)).one()
        if owner.id != installation_id:
            raise StartupError(
                f"the database {self.shown_url} belongs to the service whose home is {owner.home}, and this one's is "
                f"{home}, with another key: start with NGD_HOME set to the former, on a cluster with "
                "NGD_SIGNING_KEY_FILE set to its key, or give the latter a database of its own with NGD_DATABASE_URL"
            )

    def close(self) -> None:
        self._writers.dispose()

    def check(self) -> None:
        try:
            with self._read() as connection:
                is_fit = is_usable(connection)
        except SQLAlchemyError as error:
            raise StoreUnavailableError(f"the database can't be read: {describe(error)}") from error
        if not is_fit:
            raise StoreUnavailableError("the database's schema is not one this version takes; restart the service")

    @property
    def revision(self) -> str | None:
        """Which migration the schema is at."""
        with self._read() as connection:
            return revision(connection)

    def job_counts(self) -> JobCounts:
        with self._read() as connection:
            return job_counts(connection)

    def create_job(
        self,
        job_id: str,
        name: str,
        spec: Mapping[str, Any],
        now: datetime,
        keyed: KeyedRequest | None = None,
        created_by: str | None = None,
    ) -> tuple[JobRecord, bool]:
        row = _first_row(job_id, name, spec, now, created_by)
        try:
            return self._create_job(row, keyed)
        except IntegrityError:  # another request with the same key was faster: its job is there now
            log.info("idempotency_key_race job_id=%s", job_id)
            return self._create_job(row, keyed)

    def _create_job(self, row: Mapping[str, Any], keyed: KeyedRequest | None) -> tuple[JobRecord, bool]:
        job_id, now = row["id"], row["created_at"]
        with self._write() as connection:
            older = _job_of_key(connection, keyed, now) if keyed else None
            if older is not None:
                return older, True
            connection.execute(sa.insert(t.jobs).values(row))
            first = {"from": None, "to": Phase.QUEUED, "reason": None, "message": None}
            connection.execute(sa.insert(t.events).values(job_id=job_id, kind="phase", time=now, data=first))
            if keyed:
                key = {"key": keyed.stored_as, "fingerprint": keyed.fingerprint, "job_id": job_id, "created_at": now}
                connection.execute(sa.insert(t.idempotency_keys).values(key))
            return _existing_job(connection, job_id), False

    def get_job(self, job_id: str) -> JobRecord | None:
        with self._read() as connection:
            return _job(connection, job_id)

    def list_jobs(self, query: JobQuery, *, after: Cursor | None, limit: int) -> Listed:
        with self._read() as connection:
            return list_jobs(connection, query, after, limit)

    def queue(self, job_ids: Collection[str]) -> Queue:
        with self._read() as connection:
            return queue(connection, job_ids)

    def request_cancel(self, job_id: str, now: datetime) -> JobRecord | None:
        may_change = (t.jobs.c.desired != Desired.CANCELLED) & t.jobs.c.phase.not_in(TERMINAL)
        change = {"desired": Desired.CANCELLED, "cancel_requested_at": now, **_touched()}
        with self._write() as connection:
            connection.execute(sa.update(t.jobs).where(t.jobs.c.id == job_id, may_change).values(change))
            return _job(connection, job_id)

    def claim(self, *, lease_token: str, now: datetime, lease_s: float, max_running: int) -> list[Claim]:
        lease = {"lease_token": lease_token, "lease_expires_at": now + timedelta(seconds=lease_s)}
        with self._write() as connection:
            if not is_alone(connection):
                return []
            slots = max_running - num_taken(connection, now) + num_given_back(connection, max_running)
            query = sa.select(t.jobs).where(is_free(now), needs_a_look(slots)).order_by(t.jobs.c.id)
            rows = connection.execute(query.with_for_update(skip_locked=True)).all()
            ids = [row.id for row in rows]
            connection.execute(sa.update(t.jobs).where(t.jobs.c.id.in_(ids)).values(lease))
            live = sa.select(t.attempts).where(t.attempts.c.job_id.in_(ids), t.attempts.c.ended_at.is_(None))
            attempt_of = {row.job_id: attempt_record(row) for row in connection.execute(live)}
            failures = failed_starts(connection, ids)
            jobs = [job_record(row, *failures.get(row.id, (0, 0))) for row in rows]
            return [Claim(job, attempt_of.get(job.id), lease_token) for job in jobs]

    def renew(self, claim: Claim, now: datetime, lease_s: float) -> bool:
        with self._write() as connection:
            return change_leased(connection, claim, {"lease_expires_at": now + timedelta(seconds=lease_s)})

    def apply(
        self,
        claim: Claim,
        decision: Decision,
        now: datetime,
        outcome: Outcome | None = None,
        *,
        is_left_running: bool = False,
    ) -> bool:
        number = claim.job.attempt + (decision.action is Action.NEW_ATTEMPT)
        with self._write() as connection:
            if not change_leased(connection, claim, _job_change(claim.job, decision, number, now, outcome)):
                return False
            if decision.ends_attempt and claim.attempt is not None:
                ended = sa.update(t.attempts).where(t.attempts.c.id == claim.attempt.id)
                connection.execute(ended.values(ended_at=now, is_left_running=is_left_running))
            if decision.action is Action.NEW_ATTEMPT:
                _insert_attempt(connection, claim.job.id, number, now)
            if decision.phase is not None:
                _insert_phase_event(connection, claim.job, decision, number, now)
            return True

    def mark_submitted(self, claim: Claim) -> bool:
        return self._change_attempt(claim, {"is_submitted": True})

    def mark_stopped(self, claim: Claim, signal: Action, now: datetime) -> bool:
        return self._change_attempt(claim, {"stop": signal, "stop_sent_at": now})

    def mark_seen(self, claim: Claim, now: datetime) -> None:
        assert claim.attempt is not None
        seen = sa.update(t.attempts).where(t.attempts.c.id == claim.attempt.id)
        with self._write() as connection:
            connection.execute(seen.values(last_seen_at=now))

    def left_running(self) -> list[AttemptRecord]:
        query = sa.select(t.attempts).where(t.attempts.c.is_left_running.is_(True)).order_by(t.attempts.c.id)
        with self._read() as connection:
            return [attempt_record(row) for row in connection.execute(query)]

    def mark_gone(self, attempt_id: str) -> None:
        gone = sa.update(t.attempts).where(t.attempts.c.id == attempt_id)
        with self._write() as connection:
            connection.execute(gone.values(is_left_running=False))

    def note(self, claim: Claim, message: str | None) -> bool:
        with self._write() as connection:
            return change_leased(connection, claim, {"message": message, **_touched()})

    def release(self, claim: Claim) -> None:
        with self._write() as connection:
            change_leased(connection, claim, {"lease_token": None, "lease_expires_at": None})

    def _change_attempt(self, claim: Claim, change: Mapping[str, Any]) -> bool:
        with self._write() as connection:
            if claim.attempt is None or not change_leased(connection, claim, _touched()):
                return False
            connection.execute(sa.update(t.attempts).where(t.attempts.c.id == claim.attempt.id).values(**change))
            return True

    def get_attempt(self, attempt_id: str) -> AttemptRecord | None:
        with self._read() as connection:
            row = connection.execute(sa.select(t.attempts).where(t.attempts.c.id == attempt_id)).one_or_none()
            return None if row is None else attempt_record(row)

    def ingest(self, attempt_id: str, delivered: Sequence[Numbered], *, is_late: bool = False) -> Ingested:
        with self._write() as connection:
            return ingest(connection, attempt_id, delivered, is_late=is_late)

    def events_after(self, job_id: str, after: int, limit: int, kinds: Collection[str] = ()) -> list[EventRecord]:
        values = {"job_id": job_id, "after": after, "limit": limit}
        with self._read() as connection:
            return [event_record(row) for row in connection.execute(events_of(tuple(kinds), newest=False), values)]

    def newest_events(self, job_id: str, kinds: Collection[str], after: int, limit: int) -> list[EventRecord]:
        values = {"job_id": job_id, "after": after, "limit": limit}
        with self._read() as connection:
            return [event_record(row) for row in connection.execute(events_of(tuple(kinds), newest=True), values)][::-1]

    def spans(self, job_id: str, kind: Name, wanted: Wanted) -> Spans:
        with self._read() as connection:
            spans = read(connection, job_id, kind, wanted)
            if spans.width == 1 or not is_behind(connection, job_id):
                return spans
        self._catch_up(job_id)
        return self.spans(job_id, kind, wanted)

    def _catch_up(self, job_id: str | None = None) -> None:
        """Thins what versions without spans have stored, of one job or of all, in transactions of a bounded size."""
        is_behind = True
        while is_behind:
            with self._write() as connection:
                is_behind = catch_up(connection, job_id)

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        with reported(), self._writers.begin() as connection:
            yield connection

    @contextmanager
    def _read(self) -> Iterator[sa.Connection]:
        with reported(), self._readers.begin() as connection:
            yield connection


def _touched() -> dict[str, Any]:
    return {"resource_version": t.jobs.c.resource_version + 1}


def _job(connection: sa.Connection, job_id: str) -> JobRecord | None:
    row = connection.execute(sa.select(t.jobs).where(t.jobs.c.id == job_id)).one_or_none()
    return None if row is None else job_record(row)


def _existing_job(connection: sa.Connection, job_id: str) -> JobRecord:
    return job_record(connection.execute(sa.select(t.jobs).where(t.jobs.c.id == job_id)).one())


def _first_row(
    job_id: str, name: str, spec: Mapping[str, Any], now: datetime, created_by: str | None
) -> dict[str, Any]:
    """Returns the row of a job that waits for its first attempt."""
    return {
        "id": job_id,
        "name": name,
        "spec": dict(spec),
        "desired": Desired.RUNNING,
        "phase": Phase.QUEUED,
        "attempt": 0,
        "max_attempts": spec["failure"]["max_attempts"],
        "progress": {},
        "metrics_latest": {},
        "created_at": now,
        "created_by": created_by,
        "resource_version": 1,
    }


def _job_of_key(connection: sa.Connection, keyed: KeyedRequest, now: datetime) -> JobRecord | None:
    keys = t.idempotency_keys
    connection.execute(sa.delete(keys).where(keys.c.created_at < now - KEY_LIFETIME))
    query = sa.select(keys).where(keys.c.key == keyed.stored_as)
    row = connection.execute(query).one_or_none() or _row_of_older_version(connection, keyed)
    if row is None:
        return None
    if row.fingerprint != keyed.fingerprint:
        raise IdempotencyError(
            f"Idempotency-Key {keyed.key!r} was used for another request, which made {row.job_id}; use a new key"
        )
    return _existing_job(connection, row.job_id)


def _row_of_older_version(connection: sa.Connection, keyed: KeyedRequest) -> Any:
    """Returns the row that a version which did not tell the owners' keys apart stored for this owner's request."""
    if keyed.key_owner is None:
        return None
    keys = t.idempotency_keys
    query = sa.select(keys).join(t.jobs, t.jobs.c.id == keys.c.job_id)
    query = query.where(keys.c.key == keyed.key, t.jobs.c.created_by == keyed.key_owner)
    return connection.execute(query).one_or_none()


def _job_change(
    job: JobRecord, decision: Decision, number: int, now: datetime, outcome: Outcome | None
) -> dict[str, Any]:
    change: dict[str, Any] = {"retry_at": decision.retry_at, **_touched()}
    if decision.phase is not None:
        change |= {"phase": decision.phase, "reason": decision.reason, "message": decision.message}
    if decision.phase in TERMINAL:
        change["finished_at"] = now
    if decision.phase is Phase.SUCCEEDED and outcome is not None:
        change["result"] = outcome.model_dump_json()
    if decision.action is Action.NEW_ATTEMPT:
        waits_no_longer = {name: value for name, value in job.progress.items() if name != WAITS_FOR}
        change |= {"attempt": number, "started_at": job.started_at or now, "progress": waits_no_longer}
    return change


def _insert_attempt(connection: sa.Connection, job_id: str, number: int, now: datetime) -> None:
    row = {
        "id": attempt_id(job_id, number),
        "job_id": job_id,
        "number": number,
        "is_submitted": False,
        "has_started": False,
        "stop": Action.NONE,
        "acknowledged_seq": 0,
        "created_at": now,
    }
    connection.execute(sa.insert(t.attempts).values(row))


def _insert_phase_event(
    connection: sa.Connection, job: JobRecord, decision: Decision, number: int, now: datetime
) -> None:
    data = {"from": job.state.phase, "to": decision.phase, "reason": decision.reason, "message": decision.message}
    row = {"job_id": job.id, "attempt": number or None, "kind": "phase", "time": now, "data": data}
    connection.execute(sa.insert(t.events).values(row))
