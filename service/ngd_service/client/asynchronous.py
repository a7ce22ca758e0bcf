"""The calls of the REST API, each written once: `AsyncClient`. `Client` runs the same ones without an event loop."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, ParamSpec, Self, TypeVar
from urllib.parse import quote
from uuid import uuid4

import httpx
from httpx_sse import EventSource, ServerSentEvent

from ngd_dist.cost.plan import Plan
from ngd_service.client.answers import (
    DEFAULT_URL,
    NotFoundError,
    ServiceError,
    ServiceFailedError,
    ServiceUnreachableError,
    address,
    authorization,
    check_answer,
    may_have_arrived,
    not_this_service,
    read_answer,
    request_of,
    unknown_whether_created,
    unreachable,
    uses_proxies,
)
from ngd_service.client.code import Archive, Shipment, pack
from ngd_service.client.comparison import KINDS, History
from ngd_service.client.endpoints import (
    JOBS,
    Endpoint,
    Spec,
    code_path,
    job_path,
    joined,
    nothing,
    params,
    pin_path,
    spec_body,
    text,
)
from ngd_service.resources import (
    Anatomy,
    Checkpoint,
    CheckpointList,
    Event,
    EventPage,
    Health,
    Job,
    JobPage,
    LogChunk,
    Metrics,
    Statistics,
    Validated,
)
from ngd_workers.contract.spec import Code

__all__ = ["PATIENCE_S", "AsyncClient"]

Answer = TypeVar("Answer")
Arguments = ParamSpec("Arguments")
MOST_EVENTS = 1000  # of an answer
LONG_POLL_S = 30.0
RECONNECT_S = 1.0
CODE_TIMEOUT_S = 60.0
PLAN_TIMEOUT_S = 200.0  # a service that has no card of the model may build it first
SUBMIT_PAUSES_S = (1.0, 4.0)  # between three tries
PATIENCE_S = 60.0  # a restart of the service takes seconds
STREAM_TIMEOUT = httpx.Timeout(10.0, read=60.0)  # the service sends a comment every 15 s when nothing happens


class AsyncClient:
    """`Client` for programs that run an event loop; the same methods, awaited."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        key: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        url = address(base_url)
        self._http = httpx.AsyncClient(
            base_url=url, headers=authorization(key), transport=transport, trust_env=uses_proxies(url)
        )
        self._patience_s = patience_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    @property
    def base_url(self) -> str:
        return str(self._http.base_url).rstrip("/")

    async def submit(self, spec: Spec, *, idempotency_key: str | None = None) -> Job:
        """Returns the new job. spec: a mapping, or YAML or JSON text. The same key and spec return the same job.

        Each call has a key of its own if none is given, so that it can be made again where no answer came.
        """
        key = idempotency_key or str(uuid4())
        body = spec_body(spec)
        body["headers"] = body.get("headers", {}) | {"Idempotency-Key": key}
        for pause_s in (*SUBMIT_PAUSES_S, None):
            try:
                return await self._send(Endpoint("POST", JOBS, Job.model_validate_json, **body))
            except ServiceError as error:
                if not may_have_arrived(error):
                    raise
                if pause_s is None:
                    raise unknown_whether_created(error, key) from error
                await self._sleep(pause_s)
        raise AssertionError("the last try returns or raises")

    async def validate(self, spec: Spec) -> Validated:
        """Returns the spec with its defaults; nothing is created."""
        query = params(validate_only="true")
        return await self._send(Endpoint("POST", JOBS, Validated.model_validate_json, query, **spec_body(spec)))

    async def plan(self, request: Mapping[str, Any]) -> Plan:
        """Returns the cost of a job before it runs. request: as `ngd_service.planning.PlanRequest` reads it."""
        path, body = f"{JOBS}:plan", dict(request)
        return await self._send(Endpoint("POST", path, Plan.model_validate_json, json=body, timeout_s=PLAN_TIMEOUT_S))

    async def ship(self, spec: Spec, folder: Path) -> Shipment:
        """Sends the spec's code to the service unless it has it. Returns the spec to submit, which names the archive.

        folder: from which `code.directory` starts, that of the job's file. A spec that names an archive already, as
        that of an earlier job does, stays as it is. Raises: SpecError for what can't be packed.
        """
        valid = (await self.validate(spec)).spec
        if valid.get("code") is None or valid["code"]["sha256"] is not None:
            return Shipment(spec)
        archive = await self._apart(pack, Code.model_validate(valid["code"]), folder)
        was_there = await self.send_code(archive)
        return Shipment(valid | {"code": valid["code"] | {"sha256": archive.sha256}}, archive, was_there)

    async def send_code(self, archive: Archive) -> bool:
        """Sends packed code to the service, for jobs to name as `code.sha256`; returns whether it was there already."""
        was_there = await self._has_code(archive.sha256)
        if not was_there:
            headers = {"Content-Type": "application/octet-stream"}
            path = code_path(archive.sha256)
            await self._send(Endpoint("PUT", path, nothing, headers=headers, content=archive.content))
        return was_there

    async def code(self, sha256: str) -> bytes:
        """Returns an archive of code that was shipped: a tar.gz."""
        return await self._send(Endpoint("GET", code_path(sha256), bytes, timeout_s=CODE_TIMEOUT_S))

    async def list_jobs(
        self,
        *,
        page_size: int | None = None,
        page_token: str | None = None,
        phase: str | None = None,
        q: str | None = None,
        optimizer: str | None = None,
        owner: str | None = None,
        label: str | None = None,
        order_by: str | None = None,
    ) -> JobPage:
        """Returns one page of jobs, newest first; the filters and orders are those of GET /jobs."""
        paging = params(page_size=page_size, page_token=page_token, order_by=order_by)
        query = paging | params(phase=phase, q=q, optimizer=optimizer, owner=owner, label=label)
        return await self._send(Endpoint("GET", JOBS, JobPage.model_validate_json, query))

    async def get(self, job_id: str) -> Job:
        return await self._send(Endpoint("GET", job_path(job_id), Job.model_validate_json))

    async def wait(self, job_id: str, *, timeout_s: float | None = None) -> Job:
        """Returns the job once it has ended, or as it is after timeout_s; None: waits for as long as it takes."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = LONG_POLL_S if deadline is None else max(0.0, min(LONG_POLL_S, deadline - time.monotonic()))
            query = params(wait_for="terminal", timeout_s=left)
            job = await self._send(
                Endpoint("GET", job_path(job_id), Job.model_validate_json, query, timeout_s=left + 10)
            )
            if job.status.is_terminal or left < LONG_POLL_S:
                return job

    async def cancel(self, job_id: str) -> Job:
        """Returns the job, which ends as CANCELLED soon; calling it again changes nothing."""
        return await self._send(Endpoint("POST", f"{job_path(job_id)}:cancel", Job.model_validate_json))

    async def events(
        self,
        job_id: str,
        *,
        after: int = 0,
        limit: int = 100,
        first_of: Iterable[str] = (),
        newest_of: Iterable[str] = (),
    ) -> EventPage:
        """Returns the first events after the one of this id; of these kinds, or the newest ones of these kinds."""
        query = params(after=after, limit=limit, first_of=joined(first_of), newest_of=joined(newest_of))
        return await self._send(Endpoint("GET", f"{job_path(job_id)}/events", EventPage.model_validate_json, query))

    async def history(self, job_id: str, known: History | None = None) -> History:
        """Returns the job's tests and starts, as far as they go by now. known: an earlier answer, which grows."""
        history = History() if known is None else known
        is_whole = False
        while not is_whole:
            page = await self.events(job_id, after=history.next_after, limit=MOST_EVENTS, first_of=KINDS)
            history.add(page)
            is_whole = len(page.events) < MOST_EVENTS
        return history

    async def follow(self, job_id: str, *, after: int = 0) -> AsyncIterator[Event]:
        """Yields each event after `after` as it happens, until the job has ended; reconnects and misses none."""
        async with aclosing(self._frames(job_id, after)) as frames:
            async for frame in frames:
                if frame.event not in ("job", "end"):
                    yield Event.model_validate_json(frame.data)

    async def watch(self, job_id: str) -> AsyncIterator[Job]:
        """Yields the job now and whenever it has changed, until it has ended; reconnects."""
        async with aclosing(self._frames(job_id, 0)) as frames:
            async for frame in frames:
                if frame.event == "job":
                    yield Job.model_validate_json(frame.data)

    async def metrics(
        self,
        job_id: str,
        *,
        names: Iterable[str] = (),
        from_step: int = 0,
        to_step: int | None = None,
        max_points: int = 1000,
    ) -> Metrics:
        """Returns curves. names: empty for all; "seconds" and "bytes_sent" stand for each of their parts."""
        query = params(names=joined(names), from_step=from_step, to_step=to_step, max_points=max_points)
        return await self._send(Endpoint("GET", f"{job_path(job_id)}/metrics", Metrics.model_validate_json, query))

    async def statistics(
        self,
        job_id: str,
        *,
        from_step: int = 0,
        to_step: int | None = None,
        max_points: int = 200,
        span: int = 1,
        judged: bool = False,
    ) -> Statistics:
        """Returns the age of each statistic; judged: with the changes, noises and thresholds that decided on it."""
        told = "true" if judged else None
        query = params(from_step=from_step, to_step=to_step, max_points=max_points, span=span, judged=told)
        path = f"{job_path(job_id)}/statistics"
        return await self._send(Endpoint("GET", path, Statistics.model_validate_json, query))

    async def anatomy(self, job_id: str, *, from_step: int = 0) -> Anatomy:
        """Returns the newest that the workers told of layers, factors and ranks, in this step or later ones."""
        path = f"{job_path(job_id)}/anatomy"
        return await self._send(Endpoint("GET", path, Anatomy.model_validate_json, params(from_step=from_step)))

    async def logs(
        self, job_id: str, *, attempt: int | None = None, tail: int | None = None, rank: int | None = None
    ) -> str:
        """Returns the log of the newest, or the given, attempt; tail: its last lines alone; rank: of one rank."""
        query = params(attempt=attempt, tail=tail, rank=rank)
        return await self._send(Endpoint("GET", f"{job_path(job_id)}/logs", text, query))

    async def log_part(
        self, job_id: str, *, offset: int = 0, attempt: int | None = None, rank: int | None = None
    ) -> tuple[str, int]:
        """Returns up to a MiB of lines from this byte of the log on, and the offset of what follows them."""
        query = params(offset=offset, attempt=attempt, rank=rank)
        async with self._response(f"{job_path(job_id)}/logs", query) as response:
            return text(await response.aread()), int(response.headers["Log-End"])

    async def download_log(
        self, job_id: str, *, attempt: int | None = None, rank: int | None = None
    ) -> AsyncIterator[bytes]:
        """Yields all that is kept of the log, as it was written."""
        query = params(attempt=attempt, rank=rank, download="true")
        async with self._response(f"{job_path(job_id)}/logs", query) as response:
            async for piece in response.aiter_bytes():
                yield piece

    async def checkpoints(self, job_id: str) -> list[Checkpoint]:
        """Returns the checkpoints that the job keeps, newest first."""
        path = f"{job_path(job_id)}/checkpoints"
        return (await self._send(Endpoint("GET", path, CheckpointList.model_validate_json))).checkpoints

    async def pin(self, job_id: str, step: int) -> Checkpoint:
        """Keeps the checkpoint of this step for as long as it is pinned, however many come after it."""
        return await self._send(Endpoint("PUT", pin_path(job_id, step), Checkpoint.model_validate_json))

    async def unpin(self, job_id: str, step: int) -> Checkpoint:
        """Lets the checkpoint go when newer ones come; the next one that the job saves may remove it."""
        return await self._send(Endpoint("DELETE", pin_path(job_id, step), Checkpoint.model_validate_json))

    async def download_file(self, job_id: str, step: int, name: str, *, start: int = 0) -> AsyncIterator[bytes]:
        """Yields the bytes of a checkpoint's file from `start` on."""
        headers = {"Range": f"bytes={start}-"} if start else {}
        path = f"{job_path(job_id)}/checkpoints/{step}/files/{quote(name, safe='')}"
        async with self._response(path, None, headers) as response:
            if start and response.status_code != httpx.codes.PARTIAL_CONTENT:
                raise not_this_service(response)
            async for piece in response.aiter_bytes():
                yield piece

    async def follow_logs(
        self, job_id: str, *, attempt: int | None = None, tail: int | None = None, rank: int | None = None
    ) -> AsyncIterator[LogChunk]:
        """Yields the log as it grows, until the job has ended; goes on to later attempts if none was named."""
        query = params(attempt=attempt, tail=tail, rank=rank, follow="true")
        async with self._stream(f"{job_path(job_id)}/logs", params=query) as frames:
            async for frame in frames:
                if frame.event == "log":
                    yield LogChunk.model_validate_json(frame.data)

    async def ready(self) -> Health:
        return await self._send(Endpoint("GET", "/readyz", Health.model_validate_json))

    async def _send(self, endpoint: Endpoint[Answer]) -> Answer:
        try:
            return read_answer(await self._http.send(request_of(self._http, endpoint)), endpoint)
        except httpx.RequestError as error:
            raise unreachable(self._http.base_url, error) from error

    async def _has_code(self, sha256: str) -> bool:
        try:
            await self._send(Endpoint("HEAD", code_path(sha256), nothing))
        except NotFoundError:
            return False
        return True

    async def _apart(
        self, work: Callable[Arguments, Answer], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Answer:
        return await asyncio.to_thread(work, *args, **kwargs)

    async def _sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def _frames(self, job_id: str, after: int) -> AsyncGenerator[ServerSentEvent, None]:
        """Yields the frames of the event stream; a broken connection is taken up again where it broke."""
        lost_at: float | None = None
        while True:
            headers = {"Last-Event-ID": str(after)} if after else {}
            try:
                async with self._stream(f"{job_path(job_id)}/events/stream", headers=headers) as frames:
                    async for frame in frames:
                        lost_at = None
                        after = int(frame.id) if frame.id.isdecimal() else after
                        yield frame
                        if frame.event == "end":
                            return
                trouble: ServiceError = ServiceUnreachableError(f"{self.base_url} ends its streams; try again later")
            except (ServiceUnreachableError, ServiceFailedError) as error:
                trouble = error
            lost_at = time.monotonic() if lost_at is None else lost_at
            if time.monotonic() - lost_at >= self._patience_s:
                raise trouble
            await self._sleep(RECONNECT_S)

    @asynccontextmanager
    async def _stream(
        self, path: str, *, params: dict[str, str] | None = None, headers: dict[str, str] | None = None
    ) -> AsyncIterator[AsyncIterator[ServerSentEvent]]:
        async with self._response(path, params, headers) as response:
            if response.headers.get("content-type", "").partition(";")[0] != "text/event-stream":
                raise not_this_service(response)
            async with aclosing(EventSource(response).aiter_sse()) as frames:
                yield (frame async for frame in frames if frame.data)  # a comment that follows an id looks like one

    @asynccontextmanager
    async def _response(
        self, path: str, params: dict[str, str] | None, headers: dict[str, str] | None = None
    ) -> AsyncIterator[httpx.Response]:
        request = self._http.stream("GET", path, params=params, headers=headers, timeout=STREAM_TIMEOUT)
        try:
            async with request as response:
                if response.status_code >= 400:
                    await response.aread()
                check_answer(response)
                yield response
        except httpx.RequestError as error:
            raise unreachable(self._http.base_url, error) from error
