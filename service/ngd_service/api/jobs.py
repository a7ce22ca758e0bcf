"""/jobs: create, list, get, wait, cancel."""

import asyncio
import time
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse

from ngd_service.api.body import SPEC_BODY, SpecBody
from ngd_service.api.container import ContainerDep, JobId
from ngd_service.api.job_query import Wanted
from ngd_service.api.serializers import job_resource
from ngd_service.job_state import TERMINAL
from ngd_service.resources import Job, JobPage, Validated
from ngd_service.store.base import JobRecord

__all__ = ["router"]

router = APIRouter(prefix="/api/v1/jobs", tags=["jobs"])

MAX_PAGE_SIZE = 1000
POLL_S = 0.25


@router.post(
    "",
    status_code=201,
    response_model=Job,
    responses={200: {"model": Validated, "description": "validate_only: the spec with its defaults."}},
    openapi_extra=SPEC_BODY,
)
async def create_job(
    request: Request,
    container: ContainerDep,
    spec: SpecBody,
    validate_only: Annotated[bool, Query(description="Check the spec; create nothing.")] = False,
    idempotency_key: Annotated[
        str | None,
        Header(min_length=1, max_length=255, description="Same key, same body, same job, for 24 h."),
    ] = None,
) -> Response:
    """Creates a job, which waits its turn."""
    if validate_only:
        validated = Validated(spec=spec.model_dump(mode="json"))
        return JSONResponse(validated.model_dump(mode="json"))
    await asyncio.to_thread(container.files.archives.check, spec)
    key_owner = getattr(request.state, "key_owner", None)
    job, is_replay = await asyncio.to_thread(container.jobs.create, spec, idempotency_key, key_owner)
    headers = {"Location": f"/api/v1/jobs/{job.id}"} | ({"Idempotency-Replayed": "true"} if is_replay else {})
    body = job_resource(job).model_dump_json()
    return Response(body, status_code=201, headers=headers, media_type="application/json")


@router.get("")
def list_jobs(
    container: ContainerDep,
    wanted: Wanted,
    page_size: Annotated[int, Query(ge=1, description="Jobs per page; more than 1000 count as 1000.")] = 50,
    page_token: Annotated[str, Query(description="next_page_token of the page before.")] = "",
) -> JobPage:
    """Lists jobs, newest first unless another order is asked for."""
    jobs, token = container.jobs.list(wanted, page_size=min(page_size, MAX_PAGE_SIZE), page_token=page_token)
    return JobPage(jobs=[job_resource(job) for job in jobs], next_page_token=token)


@router.get("/{job_id}")
async def get_job(
    container: ContainerDep,
    job_id: JobId,
    wait_for: Annotated[Literal["terminal"] | None, Query(description="Answer once the job has ended.")] = None,
    timeout_s: Annotated[float, Query(ge=0, le=60, description="Answer after this at the latest.")] = 30,
) -> Job:
    """Returns a job; with wait_for, as soon as it has ended or the time is over."""
    job = await asyncio.to_thread(container.jobs.get, job_id)
    deadline = time.monotonic() + (timeout_s if wait_for else 0)
    while not _has_ended(job) and time.monotonic() < deadline and not container.closing.is_set():
        await asyncio.sleep(POLL_S)
        job = await asyncio.to_thread(container.jobs.get, job_id)
    return job_resource(job)


@router.post("/{job_id}:cancel", status_code=202, responses={200: {"model": Job, "description": "It had ended."}})
def cancel_job(container: ContainerDep, job_id: JobId, response: Response) -> Job:
    """Asks a job to end as CANCELLED; asking again, or after its end, changes nothing."""
    job = container.jobs.cancel(job_id)
    if _has_ended(job):
        response.status_code = 200
    return job_resource(job)


def _has_ended(job: JobRecord) -> bool:
    return job.state.phase in TERMINAL
