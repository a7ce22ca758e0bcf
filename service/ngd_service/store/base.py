"""The contract of a store, and the records it returns. Every method is one transaction; times are aware and in UTC."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any, Literal, Protocol

from ngd_service.job_state import Action, AttemptState, Decision, Desired, JobState, Phase
from ngd_service.store.spans import Name, Spans, Wanted
from ngd_workers.contract.events import Numbered
from ngd_workers.contract.rundir import Outcome

__all__ = [
    "AttemptRecord",
    "Claim",
    "Cursor",
    "EventRecord",
    "Ingested",
    "JobCounts",
    "JobQuery",
    "JobRecord",
    "KeyedRequest",
    "Listed",
    "Order",
    "Queue",
    "Store",
    "attempt_id",
]


Order = Literal["created", "state", "name", "owner", "optimizer", "lr", "target_step", "target_s"]
Cursor = tuple[Any, str]  # of the last job of a page: the value that it is sorted by, and its id


def attempt_id(job_id: str, number: int) -> str:
    """Returns the attempt's id, which is also its reference at the dispatcher: known before anything is started."""
    return f"{job_id}-a{number}"


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job as it is stored."""

    id: str
    name: str
    spec: dict[str, Any]
    state: JobState
    reason: str | None
    message: str | None
    attempt: int
    progress: dict[str, Any]  # step, total_steps, epoch, step_s, metrics ...; empty until the workers have started
    metrics_latest: dict[str, float]
    result: Outcome | None
    created_at: datetime
    created_by: str | None  # owner of an API key
    started_at: datetime | None
    finished_at: datetime | None
    resource_version: int


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """An attempt as it is stored; `ended_at` is None while it may run."""

    id: str
    job_id: str
    state: AttemptState
    acknowledged_seq: int
    ended_at: datetime | None


@dataclass(frozen=True, slots=True)
class EventRecord:
    """An event as it is stored; attempt and seq are None if the controller made it."""

    id: int
    job_id: str
    attempt: int | None
    seq: int | None
    kind: str
    time: datetime
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class KeyedRequest:
    """An Idempotency-Key, the fingerprint of the request that came with it, and the API key's owner that sent both."""

    key: str
    fingerprint: str
    key_owner: str | None = None

    @property
    def stored_as(self) -> str:
        """Its name in the database: each owner has keys of their own."""
        return self.key if self.key_owner is None else sha256(f"{self.key_owner}\0{self.key}".encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Claim:
    """A job that this controller alone may change until the lease ends; `attempt` is the live one, if any."""

    job: JobRecord
    attempt: AttemptRecord | None
    lease_token: str


@dataclass(frozen=True, slots=True)
class Ingested:
    """The result of storing a batch; a repeated batch has 0 new events."""

    desired: Desired
    acknowledged_seq: int
    new_events: int


@dataclass(frozen=True, slots=True)
class JobCounts:
    """How the jobs stand. last_report: when a running job's workers, or the controller, last told something of it."""

    num_in_phase: dict[Phase, int]  # a phase that no job is in is left out
    oldest_queued_at: datetime | None
    last_report_at: dict[str, datetime]  # of RUNNING jobs, by id
    in_phase_since: dict[Phase, datetime]  # of the PASSING phases that a job is in: since when the longest one is


@dataclass(frozen=True, slots=True)
class Queue:
    """The place of waiting jobs, 1 for the next one; how many wait, and how many jobs hold a slot."""

    places: dict[str, int]
    num_waiting: int
    num_active: int


@dataclass(frozen=True, slots=True)
class JobQuery:
    """Which jobs a list has, and their order; an empty filter takes all. state: active, waiting, then ended jobs."""

    phases: Sequence[Phase] = ()
    text: str = ""  # a part of the name or of the id, in any case
    optimizers: Sequence[str] = ()
    owners: Sequence[str] = ()
    labels: Sequence[tuple[str, str | None]] = ()  # None: any value
    order: Order = "created"
    is_descending: bool = True


@dataclass(frozen=True, slots=True)
class Listed:
    """A page of jobs, and where the next one begins; None: there is none."""

    jobs: Sequence[JobRecord]
    next: Cursor | None


class Store(Protocol):
    """What the controller needs of a database. Raises: StoreUnavailableError if it does not answer."""

    def create_job(
        self,
        job_id: str,
        name: str,
        spec: Mapping[str, Any],
        now: datetime,
        keyed: KeyedRequest | None = None,
        created_by: str | None = None,
    ) -> tuple[JobRecord, bool]:
        """Returns the job and whether it is an older one of the same key. Raises: IdempotencyError (other request)."""
        ...

    def get_job(self, job_id: str) -> JobRecord | None: ...

    def list_jobs(self, query: JobQuery, *, after: Cursor | None, limit: int) -> Listed:
        """Returns the page that begins after the cursor; None: the first one."""
        ...

    def queue(self, job_ids: Collection[str]) -> Queue:
        """Returns the places of those of the jobs that wait."""
        ...

    def request_cancel(self, job_id: str, now: datetime) -> JobRecord | None:
        """Returns the job with CANCELLED desired; a job that has ended stays as it is. None: no such job."""
        ...

    def claim(self, *, lease_token: str, now: datetime, lease_s: float, max_running: int) -> list[Claim]:
        """Returns the jobs to look at, each with its live attempt, under a lease of lease_s.

        They are the active ones, cancelled ones that wait, and the oldest waiting ones that fit beside the active
        within max_running. Jobs under the lease of another claim are left out.
        """
        ...

    def renew(self, claim: Claim, now: datetime, lease_s: float) -> bool:
        """Returns whether the lease still holds; if so it does for another lease_s."""
        ...

    def apply(
        self,
        claim: Claim,
        decision: Decision,
        now: datetime,
        outcome: Outcome | None = None,
        *,
        is_left_running: bool = False,
    ) -> bool:
        """Returns whether the lease still held and the decision was stored: phase, event and attempt together.

        is_left_running: the attempt that ends with it could not be ended where it runs, and is to be when that answers.
        """
        ...

    def mark_submitted(self, claim: Claim) -> bool: ...

    def mark_stopped(self, claim: Claim, signal: Action, now: datetime) -> bool: ...

    def mark_seen(self, claim: Claim, now: datetime) -> None:
        """Notes that the attempt is known to run, with no event and no change of the job."""
        ...

    def left_running(self) -> list[AttemptRecord]:
        """Returns the ended attempts that could not be ended where they run."""
        ...

    def mark_gone(self, attempt_id: str) -> None:
        """Takes an attempt off left_running."""
        ...

    def note(self, claim: Claim, message: str | None) -> bool:
        """Replaces the job's message, with no event: the reason for waiting while its phase stays."""
        ...

    def release(self, claim: Claim) -> None:
        """Ends the lease, if it is still this claim's."""
        ...

    def get_attempt(self, attempt_id: str) -> AttemptRecord | None:
        """Returns the attempt, ended or not; None: there is none."""
        ...

    def ingest(self, attempt_id: str, delivered: Sequence[Numbered], *, is_late: bool = False) -> Ingested:
        """Stores events that are new by (attempt, seq); a repeated delivery changes nothing.

        is_late: the controller itself delivers the events that an attempt has left behind, before the next one starts.
        Raises: NotFoundError, StaleAttemptError (the attempt has ended or a later one has taken over).
        """
        ...

    def events_after(self, job_id: str, after: int, limit: int, kinds: Collection[str] = ()) -> list[EventRecord]:
        """Returns the job's first events after the one with this id. kinds: empty for all."""
        ...

    def newest_events(self, job_id: str, kinds: Collection[str], after: int, limit: int) -> list[EventRecord]:
        """Returns the last events of these kinds, oldest first, as far as they come after the one with this id."""
        ...

    def spans(self, job_id: str, kind: Name, wanted: Wanted) -> Spans:
        """Returns the steps asked for, as fine as is allowed; however long the job, the rows that are read are bounded.

        A step redone by a later attempt stands as that attempt did it.
        """
        ...

    def job_counts(self) -> JobCounts:
        """Returns how the jobs stand, for monitoring."""
        ...

    def check(self) -> None:
        """Raises: StoreUnavailableError if the database does not answer or its schema is not one this version takes."""
        ...

    def close(self) -> None: ...
