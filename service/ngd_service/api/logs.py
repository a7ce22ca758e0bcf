"""/jobs/{id}/logs: the output of an attempt's processes, to be read, followed, or downloaded as it is."""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import PlainTextResponse, StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT

from ngd_service.api.container import Container, ContainerDep, JobId
from ngd_service.api.events import KEEP_ALIVE_S, STREAM_POLL_S, frame, stream
from ngd_service.dispatchers.base import AttemptRef
from ngd_service.dispatchers.log_file import LogFile, LogPart, as_read
from ngd_service.errors import InvalidParameterError, NotFoundError, RangeError
from ngd_service.job_state import TERMINAL
from ngd_service.resources import LogChunk
from ngd_service.store.base import JobRecord

__all__ = ["router"]

router = APIRouter(prefix="/api/v1/jobs/{job_id}/logs", tags=["logs"])

PIECE_BYTES = 1 << 16
RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
ALONE = {"download": ("tail", "offset", "follow"), "tail": ("offset",)}


@router.get(
    "",
    response_class=PlainTextResponse,
    responses={
        200: {
            "content": {"text/plain": {}, "text/event-stream": {}},
            "description": "The log's last lines, or those that were asked for; Log-End is the offset that follows.",
            "headers": {"Log-End": {"schema": {"type": "integer"}}, "Log-Start": {"schema": {"type": "integer"}}},
        },
        206: {"content": {"text/plain": {}}, "description": "The bytes of the Range, as they are."},
    },
)
async def get_logs(
    request: Request,
    container: ContainerDep,
    job_id: JobId,
    attempt: Annotated[int | None, Query(ge=1, description="None: the newest.")] = None,
    rank: Annotated[
        int | None, Query(ge=0, description="What this rank alone wrote; None: all, and the driver.")
    ] = None,
    tail: Annotated[int | None, Query(ge=0, le=100_000, description="Last lines; None: up to the last MiB.")] = None,
    offset: Annotated[int | None, Query(ge=0, le=2**62, description="Up to a MiB of lines from this byte on.")] = None,
    follow: Annotated[bool, Query(description="Stream what is written from now on, until the job has ended.")] = False,
    download: Annotated[bool, Query(description="All that is kept, as a file and as it was written.")] = False,
    byte_range: Annotated[str | None, Header(alias="Range", description="bytes=first-last, as it was written.")] = None,
) -> Response:
    """Returns the log's lines; with follow, frames `log` of {attempt, text, end} and `end`.

    Lines are given as a terminal shows them: of what a progress bar drew over, its last state. A line in brackets that
    begins with "ngd:" tells of bytes that are not shown. With download or Range the bytes are as they were written.
    """
    _refuse_both(request)
    job = await asyncio.to_thread(container.jobs.get, job_id)
    _check(job, attempt, rank)
    if follow:
        return stream(_frames(container, job, attempt, rank, tail, offset))
    ref = AttemptRef(job_id, attempt or job.attempt)
    log = container.files.log(ref, rank)
    if download or byte_range:
        name = f"{ref.attempt_id}{'' if rank is None else f'-rank-{rank}'}.log"
        return await asyncio.to_thread(_download, log, name, byte_range)
    part = await asyncio.to_thread(_part, log, tail, offset)
    headers = {"Log-Start": str(part.start), "Log-End": str(part.end)}
    return PlainTextResponse(_notice(log, part) + as_read(part.text), headers=headers)


def _refuse_both(request: Request) -> None:
    for name, others in ALONE.items():
        both = [other for other in others if other in request.query_params]
        if name in request.query_params and both:
            raise InvalidParameterError(f"{name} can't be given together with {both[0]}; leave one out")


def _check(job: JobRecord, attempt: int | None, rank: int | None) -> None:
    if attempt is not None and attempt > job.attempt:
        raise NotFoundError(f"{job.id} has no attempt {attempt}; its newest is {job.attempt}")
    num_workers = job.spec["resources"]["workers"]
    if rank is not None and rank >= num_workers:
        raise NotFoundError(f"{job.id} has no rank {rank}; its {num_workers} workers count from 0")


def _part(log: LogFile, tail: int | None, offset: int | None) -> LogPart:
    return log.tail(tail) if offset is None else log.part(offset)


def _notice(log: LogFile, part: LogPart) -> bytes:
    """Returns a line about the bytes left out before the part, if there are any."""
    if not part.left_out:
        return b""
    begin = log.begin
    dropped = f"{begin:,} bytes were dropped, for a log keeps its newest part (NGD_MAX_LOG_MIB)" if begin else ""
    is_more = part.start - begin > PIECE_BYTES  # than the line that dropping has cut
    hidden = "the lines before these are had with offset or download" if is_more else ""
    return f"[ngd: {'; '.join(filter(None, (dropped, hidden)))}]\n".encode()


def _download(log: LogFile, name: str, byte_range: str | None) -> Response:
    begin, size = log.begin, log.size
    headers = {"Accept-Ranges": "bytes", "Content-Disposition": f'attachment; filename="{name}"'}
    asked = RANGE.fullmatch(byte_range or "")
    if asked is None or asked.groups() == ("", ""):  # RFC 9110: a Range that is not understood is passed over
        notice = f"[ngd: {begin:,} bytes before this were dropped]\n".encode() if begin else b""
        headers["Content-Length"] = str(len(notice) + size - begin)
        return StreamingResponse(_pieces(log, begin, size, notice), media_type="text/plain", headers=headers)
    first, last = asked.groups()
    start = int(first) if first else max(size - int(last), 0)
    end = min(int(last) + 1, size) if first and last else size
    if start < begin or start >= end:
        kept = f"bytes {begin:,} to {size - 1:,}" if size > begin else "none"
        raise RangeError(f"the log has {size:,} bytes, of which are kept: {kept}; got Range {byte_range!r}", size)
    headers |= {"Content-Length": str(end - start), "Content-Range": f"bytes {start}-{end - 1}/{size}"}
    pieces = _pieces(log, start, end)
    return StreamingResponse(pieces, HTTPStatus.PARTIAL_CONTENT, media_type="text/plain", headers=headers)


async def _pieces(log: LogFile, start: int, end: int, before: bytes = b"") -> AsyncIterator[bytes]:
    if before:
        yield before
    while start < end:
        piece = await asyncio.to_thread(log.read, start, min(PIECE_BYTES, end - start))
        if not piece:
            return
        start += len(piece)
        yield piece


async def _frames(
    container: Container, job: JobRecord, attempt: int | None, rank: int | None, tail: int | None, offset: int | None
) -> AsyncIterator[bytes]:
    shown, quiet_since = attempt or job.attempt, time.monotonic()
    log = container.files.log(AttemptRef(job.id, shown), rank)
    part = await asyncio.to_thread(_part, log, tail, offset)
    part = _whole_lines(part)
    notice = await asyncio.to_thread(_notice, log, part)
    while not container.closing.is_set():
        is_over = job.state.phase in TERMINAL or shown < job.attempt
        if part.text:
            quiet_since = time.monotonic()
            text = notice + as_read(part.text)
            yield frame("log", LogChunk(attempt=shown, text=text.decode(errors="replace"), end=part.end))
        elif is_over and (attempt is not None or shown == job.attempt):
            yield frame("end", None)
            return
        elif is_over:
            shown += 1
            log, part = container.files.log(AttemptRef(job.id, shown), rank), LogPart(b"", 0, 0)
        elif time.monotonic() - quiet_since > KEEP_ALIVE_S:
            quiet_since = time.monotonic()
            yield KEEPALIVE_COMMENT
        else:
            await asyncio.sleep(STREAM_POLL_S)
        # The job is read before the log: if it has ended by then, the log is complete.
        job = await asyncio.to_thread(container.jobs.get, job.id)
        is_complete = job.state.phase in TERMINAL or shown < job.attempt
        part = await asyncio.to_thread(log.part, part.end)
        part = part if is_complete else _whole_lines(part)
        notice = await asyncio.to_thread(_notice, log, part)


def _whole_lines(part: LogPart) -> LogPart:
    """Returns the part up to its last line's end: the rest is still being written, by a progress bar maybe."""
    end = part.text.rfind(b"\n") + 1
    if end == 0 and len(part.text) > PIECE_BYTES:
        return part
    return LogPart(part.text[:end], part.start, part.start + end, part.left_out)
