"""/jobs/{id}/logs: what an attempt's processes wrote, as text or as a stream."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Query, Response
from fastapi.responses import PlainTextResponse, StreamingResponse

from service.api.events import KEEP_ALIVE_S, STREAM_HEADERS, STREAM_POLL_S
from service.api.parts import JobId, Parts, PartsDep
from service.dispatchers.base import AttemptRef
from service.errors import NotFoundError
from service.job_state import TERMINAL
from service.resources import LogChunk
from service.server_sent import KEEP_ALIVE, encode
from service.store.base import JobRecord

__all__ = ["router"]

router = APIRouter(prefix="/api/v1/jobs/{job_id}/logs", tags=["logs"])

CHUNK_BYTES = 1 << 16


@router.get(
    "",
    response_class=PlainTextResponse,
    responses={200: {"content": {"text/plain": {}, "text/event-stream": {}}, "description": "The log's last lines."}},
)
async def get_logs(
    parts: PartsDep,
    job_id: JobId,
    attempt: Annotated[int | None, Query(ge=1, description="None: the newest.")] = None,
    tail: Annotated[int | None, Query(ge=0, le=100_000, description="Last lines; None: up to the last MiB.")] = None,
    follow: Annotated[bool, Query(description="Stream what is written from now on, until the job has ended.")] = False,
) -> Response:
    """Returns the log; with follow, frames `log` of {attempt, text} and `end`."""
    job = await asyncio.to_thread(parts.jobs.get, job_id)
    if attempt is not None and attempt > job.attempt:
        raise NotFoundError(f"{job_id} has no attempt {attempt}; its newest is {job.attempt}")
    if follow:
        frames = _frames(parts, job, attempt, tail)
        return StreamingResponse(frames, media_type="text/event-stream", headers=STREAM_HEADERS)
    text, _ = await asyncio.to_thread(parts.files.tail_log, AttemptRef(job_id, attempt or job.attempt), tail)
    return PlainTextResponse(text)


async def _frames(parts: Parts, job: JobRecord, attempt: int | None, tail: int | None) -> AsyncIterator[str]:
    shown, quiet_since = attempt or job.attempt, time.monotonic()
    text, offset = await asyncio.to_thread(parts.files.tail_log, AttemptRef(job.id, shown), tail)
    while not parts.closing.is_set():
        if text:
            quiet_since = time.monotonic()
            yield encode("log", LogChunk(attempt=shown, text=text.decode(errors="replace")))
        elif job.state.phase in TERMINAL or (attempt is not None and attempt < job.attempt):
            yield encode("end", None)
            return
        elif attempt is None and shown < job.attempt:
            shown, offset = shown + 1, 0
        elif time.monotonic() - quiet_since > KEEP_ALIVE_S:
            quiet_since = time.monotonic()
            yield KEEP_ALIVE
        else:
            await asyncio.sleep(STREAM_POLL_S)
        # The job is read before the log: if it has ended by then, the log is complete.
        job = await asyncio.to_thread(parts.jobs.get, job.id)
        text = await asyncio.to_thread(_whole_lines, parts, AttemptRef(job.id, shown), offset)
        offset += len(text)


def _whole_lines(parts: Parts, ref: AttemptRef, offset: int) -> bytes:
    """Returns what follows, cut after a line, so that no character is torn in two; a long line goes as it is."""
    text = parts.files.read_log(ref, offset, CHUNK_BYTES)
    end = text.rfind(b"\n") + 1
    return text[:end] if end else text
