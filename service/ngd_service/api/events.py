"""/jobs/{id}/events: the list, and the stream that a client resumes by Last-Event-ID."""

import asyncio
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Header, Query
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from pydantic import BaseModel

from ngd_service.api.container import MAX_CURSOR, Container, ContainerDep, JobId
from ngd_service.api.serializers import event_resource, job_resource
from ngd_service.errors import InvalidParameterError
from ngd_service.job_state import TERMINAL
from ngd_service.resources import EventPage
from ngd_service.store.base import EventRecord, JobRecord

__all__ = ["frame", "router", "stream"]

router = APIRouter(prefix="/api/v1/jobs/{job_id}/events", tags=["events"])

STREAM_POLL_S = 0.25  # at most four redraws a second
STREAM_BATCH = 500
KEEP_ALIVE_S = 15.0
After = Annotated[int, Query(ge=0, le=MAX_CURSOR, description="Only events after this id.")]
Kinds = partial(Query, pattern=r"^[a-z_, ]*$", max_length=500)
FirstOf = Annotated[str, Kinds(description="Comma-separated kinds: only events of these, `limit` at most.")]
NewestOf = Annotated[str, Kinds(description="The same, but the newest ones instead of the first after `after`.")]


@router.get("")
def list_events(
    container: ContainerDep,
    job_id: JobId,
    after: After = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    first_of: FirstOf = "",
    newest_of: NewestOf = "",
) -> EventPage:
    """Lists a job's events, oldest first."""
    container.jobs.get(job_id)
    first, newest = (list(dict.fromkeys(kinds.replace(",", " ").split())) for kinds in (first_of, newest_of))
    if first and newest:
        raise InvalidParameterError("first_of and newest_of are given both; leave one of them out")
    if newest:
        events = container.store.newest_events(job_id, newest, after, limit)
    else:
        events = container.store.events_after(job_id, after, limit, first)
    return EventPage(events=[event_resource(event) for event in events], next_after=events[-1].id if events else after)


@router.get(
    "/stream",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}, "description": "job, then one frame per event, then end."}},
)
async def stream_events(
    container: ContainerDep,
    job_id: JobId,
    after: After = 0,
    last_event_id: Annotated[
        int | None, Header(ge=0, le=MAX_CURSOR, description="As `after`; browsers send it.")
    ] = None,
) -> EventSourceResponse:
    """Streams the job and its events as they come, until it has ended.

    `event: job` holds the whole job, at first and after each change; the others are named for the event's kind and
    carry its id; `end` is the last.
    """
    await asyncio.to_thread(container.jobs.get, job_id)
    return stream(_frames(container, job_id, after if last_event_id is None else last_event_id))


def stream(frames: AsyncIterator[bytes]) -> EventSourceResponse:
    """Returns the answer that sends the frames; no cache or proxy may hold them back."""
    return EventSourceResponse(frames, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})


def frame(event: str, data: BaseModel | None, *, cursor: int | None = None) -> bytes:
    """Returns one server-sent event. cursor: the id that Last-Event-ID goes on from, if the event moves it."""
    content = "{}" if data is None else data.model_dump_json()
    return format_sse_event(data_str=content, event=event, id=None if cursor is None else str(cursor))


async def _frames(container: Container, job_id: str, after: int) -> AsyncIterator[bytes]:
    sent, quiet_since = None, time.monotonic()
    while not container.closing.is_set():
        job, events = await asyncio.to_thread(_news, container, job_id, after)
        for event in events:
            after = event.id
            yield frame(event.kind, event_resource(event), cursor=after)
        if (job.resource_version, job.message) != sent:  # a place in the queue changes with the jobs before it
            sent, quiet_since = (job.resource_version, job.message), time.monotonic()
            yield frame("job", job_resource(job))
        elif time.monotonic() - quiet_since > KEEP_ALIVE_S:
            quiet_since = time.monotonic()
            yield KEEPALIVE_COMMENT
        if job.state.phase in TERMINAL and len(events) < STREAM_BATCH:
            yield frame("end", None)
            return
        if len(events) < STREAM_BATCH:
            await asyncio.sleep(STREAM_POLL_S)


def _news(container: Container, job_id: str, after: int) -> tuple[JobRecord, list[EventRecord]]:
    # The job is read first: if it has ended by then, all of its events are there to be read.
    job = container.jobs.get(job_id)
    return job, container.store.events_after(job_id, after, STREAM_BATCH)
