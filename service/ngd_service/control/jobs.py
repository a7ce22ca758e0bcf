"""The requests of users, against the Store protocol. Sets the desired state; phases are the reconciler's."""

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from ulid import ULID

from ngd_service.auth.tokens import Tokens
from ngd_service.errors import InvalidParameterError, NotFoundError
from ngd_service.job_state import Phase
from ngd_service.resources import ProblemItem
from ngd_service.store.base import JobRecord, KeyedRequest, Store
from ngd_workers.contract.spec import AnySpec
from ngd_workers.contract.spec_problems import did_you_mean

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

    def list(self, *, phases: Collection[str], page_size: int, page_token: str) -> tuple[Sequence[JobRecord], str]:
        """Returns a page, newest first, and the next page's token ("": none). Raises: problems of the parameters."""
        wanted = sorted({_phase(name) for name in phases})
        query = ",".join(wanted)
        before_id = self._tokens.before_id(page_token, query) if page_token else None
        jobs = self._store.list_jobs(phases=wanted, before_id=before_id, limit=page_size + 1)
        page = self._placed(jobs[:page_size])
        return page, self._tokens.page(page[-1].id, query) if len(jobs) > page_size else ""

    def cancel(self, job_id: str) -> JobRecord:
        """Returns the job, with CANCELLED desired unless it has ended. Raises: NotFoundError."""
        job = _found(self._store.request_cancel(job_id, datetime.now(UTC)), job_id)
        self._wake()
        return job

    def _placed(self, jobs: Sequence[JobRecord]) -> Sequence[JobRecord]:
        """Gives each waiting job its place and the reason for waiting; both change with every job before it."""
        if all(job.state.phase is not Phase.QUEUED for job in jobs):
            return jobs
        queue = self._store.queue()
        place = {job_id: place for place, job_id in enumerate(queue.ids, start=1)}
        return [
            replace(job, message=self._waits_for(place[job.id], len(place), queue.num_active, job.message))
            if job.id in place
            else job
            for job in jobs
        ]

    def _waits_for(self, place: int, num_waiting: int, num_active: int, message: str | None) -> str:
        is_next = place <= self._max_running_jobs - num_active
        why = message or (
            "it starts next"
            if is_next
            else f"it waits for a running job to end ({num_active} run, "
            f"NGD_MAX_RUNNING_JOBS is {self._max_running_jobs})"
        )
        return f"number {place} of {num_waiting} in the queue: {why}"


def _found(job: JobRecord | None, job_id: str) -> JobRecord:
    if job is None:
        raise NotFoundError(f"there is no job {job_id!r}; GET /api/v1/jobs lists those there are")
    return job


def _fingerprint(body: object) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _phase(name: str) -> Phase:
    try:
        return Phase(name.upper())
    except ValueError:
        detail = f"phase must be one of {', '.join(Phase)}, got {name!r}"
        item = ProblemItem(
            pointer="phase", code="invalid_choice", detail=detail, hint=did_you_mean(name.upper(), Phase)
        )
        raise InvalidParameterError(detail, [item]) from None
