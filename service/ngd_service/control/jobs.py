"""The requests of users, against the Store protocol. Sets the desired state; phases are the reconciler's."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from ulid import ULID

from ngd_service.auth.tokens import Tokens
from ngd_service.errors import NotFoundError
from ngd_service.job_state import Phase
from ngd_service.store.base import JobQuery, JobRecord, KeyedRequest, Queue, Store
from ngd_workers.contract.spec import AnySpec

__all__ = ["Jobs"]


class Jobs:
    """The user's side of jobs. wake: called after a change that the reconciler should see soon."""

    def __init__(self, store: Store, tokens: Tokens, wake: Callable[[], None], max_running_jobs: int) -> None:
        self._store = store
        self._tokens = tokens
        self._wake = wake
        self._max_running_jobs = max_running_jobs

    def create(
        self, spec: AnySpec, idempotency_key: str | None, created_by: str | None = None
    ) -> tuple[JobRecord, bool]:
        """Returns the job and whether the same request had made it before. created_by: the API key's owner, whose
        idempotency keys are their own.

        Raises: IdempotencyError.
        """
        body = spec.model_dump(mode="json")
        keyed = None if idempotency_key is None else KeyedRequest(idempotency_key, _fingerprint(body), created_by)
        job, is_replay = self._store.create_job(f"job_{ULID()}", spec.name, body, datetime.now(UTC), keyed, created_by)
        self._wake()
        (job,) = self._placed([job])
        return job, is_replay

    def get(self, job_id: str) -> JobRecord:
        """Returns the job. Raises: NotFoundError."""
        (job,) = self._placed([_found(self._store.get_job(job_id), job_id)])
        return job

    def list(self, query: JobQuery, *, page_size: int, page_token: str) -> tuple[Sequence[JobRecord], str]:
        """Returns a page and the next page's token ("": none). Raises: PageTokenError."""
        after = self._tokens.cursor(page_token, repr(query)) if page_token else None
        listed = self._store.list_jobs(query, after=after, limit=page_size)
        return self._placed(listed.jobs), "" if listed.next is None else self._tokens.page(listed.next, repr(query))

    def cancel(self, job_id: str) -> JobRecord:
        """Returns the job, with CANCELLED desired unless it has ended. Raises: NotFoundError."""
        job = _found(self._store.request_cancel(job_id, datetime.now(UTC)), job_id)
        self._wake()
        return job

    def _placed(self, jobs: Sequence[JobRecord]) -> Sequence[JobRecord]:
        """Gives each waiting job its place and the reason for waiting; both change with every job before it."""
        waiting = [job.id for job in jobs if job.state.phase is Phase.QUEUED]
        if not waiting:
            return jobs
        queue = self._store.queue(waiting)
        return [
            replace(job, message=self._waits_for(queue.places[job.id], queue, job.message))
            if job.id in queue.places
            else job
            for job in jobs
        ]

    def _waits_for(self, place: int, queue: Queue, message: str | None) -> str:
        is_next = place <= self._max_running_jobs - queue.num_active
        why = message or (
            "it starts next"
            if is_next
            else f"it waits for a running job to end ({queue.num_active} run, "
            f"NGD_MAX_RUNNING_JOBS is {self._max_running_jobs})"
        )
        return f"number {place} of {queue.num_waiting} in the queue: {why}"


def _found(job: JobRecord | None, job_id: str) -> JobRecord:
    if job is None:
        raise NotFoundError(f"there is no job {job_id!r}; GET /api/v1/jobs lists those there are")
    return job


def _fingerprint(body: object) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
