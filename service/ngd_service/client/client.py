"""The Python SDK over the REST API: `Client`, and `AsyncClient` for programs that run an event loop.

    with Client("http://127.0.0.1:8000") as client:  # key="...", if the service wants one
        job = client.submit(Path("digits.yaml").read_text())
        for job in client.watch(job.id):
            print(job.status.progress.step, job.metrics_latest.get("loss"))

What they raise is in answers.py.
"""

import asyncio
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Self, TypeVar
from uuid import uuid4

import httpx

from ngd_service.client import calls
from ngd_service.client.answers import (
    DEFAULT_URL,
    ConflictError,
    InvalidKeyError,
    InvalidRequestError,
    NotFoundError,
    NotThisServiceError,
    RequestRefusedError,
    ServiceError,
    ServiceFailedError,
    ServiceUnreachableError,
    UnauthorizedError,
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
from ngd_service.client.calls import Call, Spec
from ngd_service.client.server_sent import Frame, frames
from ngd_service.resources import Event, EventPage, Health, Job, JobPage, LogChunk, Metrics, Statistics, Validated

__all__ = [
    "AsyncClient",
    "Client",
    "ConflictError",
    "InvalidKeyError",
    "InvalidRequestError",
    "NotFoundError",
    "NotThisServiceError",
    "RequestRefusedError",
    "ServiceError",
    "ServiceFailedError",
    "ServiceUnreachableError",
    "UnauthorizedError",
]

Answer = TypeVar("Answer")
LONG_POLL_S = 30.0
RECONNECT_S = 1.0
SUBMIT_PAUSES_S = (1.0, 4.0)  # between three tries
PATIENCE_S = 60.0  # a restart of the service takes seconds
STREAM_TIMEOUT = httpx.Timeout(10.0, read=60.0)  # the service sends a comment every 15 s when nothing happens


class Client:
    """Talks to one service; use it as a context manager, or call close(). Safe to share between threads.

    key: an API key, if the service wants one. patience_s: for how long follow() and watch() look for one that has gone.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        key: str | None = None,
        transport: httpx.BaseTransport | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        url = address(base_url)
        self._http = httpx.Client(
            base_url=url, headers=authorization(key), transport=transport, trust_env=uses_proxies(url)
        )
        self._patience_s = patience_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    @property
    def base_url(self) -> str:
        return str(self._http.base_url).rstrip("/")

    def submit(self, spec: Spec, *, idempotency_key: str | None = None) -> Job:
        """Returns the new job. spec: a mapping, or YAML or JSON text. The same key and spec return the same job.

        Each call has a key of its own if none is given, so that it can be made again where no answer came.
        """
        key = idempotency_key or str(uuid4())
        call = calls.submit(spec, key)
        for pause_s in (*SUBMIT_PAUSES_S, None):
            try:
                return self._send(call)
            except ServiceError as error:
                if not may_have_arrived(error):
                    raise
                if pause_s is None:
                    raise unknown_whether_created(error, key) from error
                time.sleep(pause_s)
        raise AssertionError("the last try returns or raises")

    def validate(self, spec: Spec) -> Validated:
        """Returns the spec with its defaults; nothing is created."""
        return self._send(calls.validate(spec))

    def list_jobs(
        self, *, page_size: int | None = None, page_token: str | None = None, phase: str | None = None
    ) -> JobPage:
        """Returns one page of jobs, newest first."""
        return self._send(calls.list_jobs(page_size, page_token, phase))

    def get(self, job_id: str) -> Job:
        return self._send(calls.get(job_id))

    def wait(self, job_id: str, *, timeout_s: float | None = None) -> Job:
        """Returns the job once it has ended, or as it is after timeout_s; None: waits for as long as it takes."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = LONG_POLL_S if deadline is None else max(0.0, min(LONG_POLL_S, deadline - time.monotonic()))
            job = self._send(calls.wait(job_id, left))
            if job.status.is_terminal or left < LONG_POLL_S:
                return job

    def cancel(self, job_id: str) -> Job:
        """Returns the job, which ends as CANCELLED soon; calling it again changes nothing."""
        return self._send(calls.cancel(job_id))

    def events(self, job_id: str, *, after: int = 0, limit: int = 100, newest_of: Iterable[str] = ()) -> EventPage:
        """Returns the first events after the one of this id; newest_of: the last ones, of these kinds."""
        return self._send(calls.events(job_id, after, limit, newest_of))

    def follow(self, job_id: str, *, after: int = 0) -> Iterator[Event]:
        """Yields each event after `after` as it happens, until the job has ended; reconnects and misses none."""
        for frame in self._frames(job_id, after):
            if frame.event not in ("job", "end"):
                yield Event.model_validate_json(frame.data)

    def watch(self, job_id: str) -> Iterator[Job]:
        """Yields the job now and whenever it has changed, until it has ended; reconnects."""
        for frame in self._frames(job_id, 0):
            if frame.event == "job":
                yield Job.model_validate_json(frame.data)

    def metrics(
        self,
        job_id: str,
        *,
        names: Iterable[str] = (),
        from_step: int = 0,
        to_step: int | None = None,
        max_points: int = 1000,
    ) -> Metrics:
        """Returns curves. names: empty for all; "seconds" and "bytes_sent" stand for each of their parts."""
        return self._send(calls.metrics(job_id, names, from_step, to_step, max_points))

    def statistics(self, job_id: str, *, from_step: int = 0, max_points: int = 200, span: int = 1) -> Statistics:
        return self._send(calls.statistics(job_id, from_step, max_points, span))

    def logs(self, job_id: str, *, attempt: int | None = None, tail: int | None = None, rank: int | None = None) -> str:
        """Returns the log of the newest, or the given, attempt; tail: its last lines alone; rank: of one rank."""
        return self._send(calls.logs(job_id, attempt, tail, rank))

    def download_log(self, job_id: str, *, attempt: int | None = None, rank: int | None = None) -> Iterator[bytes]:
        """Yields all that is kept of the log, as it was written."""
        path, params = calls.log_file(job_id, attempt, rank)
        try:
            with self._http.stream("GET", path, params=params, timeout=STREAM_TIMEOUT) as response:
                if response.status_code >= 400:
                    response.read()
                check_answer(response)
                yield from response.iter_bytes()
        except httpx.RequestError as error:
            raise unreachable(self._http.base_url, error) from error

    def follow_logs(
        self, job_id: str, *, attempt: int | None = None, tail: int | None = None, rank: int | None = None
    ) -> Iterator[LogChunk]:
        """Yields the log as it grows, until the job has ended; goes on to later attempts if none was named."""
        path, params = calls.log_stream(job_id, attempt, tail, rank)
        try:
            with self._stream(path, params=params) as response:
                for frame in frames(response.iter_lines()):
                    if frame.event == "log":
                        yield LogChunk.model_validate_json(frame.data)
        except httpx.RequestError as error:
            raise unreachable(self._http.base_url, error) from error

    def ready(self) -> Health:
        return self._send(calls.ready())

    def _send(self, call: Call[Answer]) -> Answer:
        try:
            return read_answer(self._http.send(request_of(self._http, call)), call)
        except httpx.RequestError as error:
            raise unreachable(self._http.base_url, error) from error

    def _frames(self, job_id: str, after: int) -> Iterator[Frame]:
        """Yields the frames of the event stream; a broken connection is taken up again where it broke."""
        lost_at: float | None = None
        while True:
            path, headers = calls.event_stream(job_id, after)
            try:
                with self._stream(path, headers=headers) as response:
                    for frame in frames(response.iter_lines()):
                        lost_at = None
                        after = frame.cursor or after
                        yield frame
                        if frame.event == "end":
                            return
                trouble: ServiceError = ServiceUnreachableError(f"{self.base_url} ends its streams; try again later")
            except httpx.RequestError as error:
                trouble = unreachable(self._http.base_url, error)
            except ServiceFailedError as error:
                trouble = error
            lost_at = time.monotonic() if lost_at is None else lost_at
            if time.monotonic() - lost_at >= self._patience_s:
                raise trouble
            time.sleep(RECONNECT_S)

    @contextmanager
    def _stream(
        self, path: str, *, params: dict[str, str] | None = None, headers: dict[str, str] | None = None
    ) -> Iterator[httpx.Response]:
        with self._http.stream("GET", path, params=params, headers=headers, timeout=STREAM_TIMEOUT) as response:
            if response.status_code >= 400:
                response.read()
            check_answer(response)
            if response.headers.get("content-type", "").partition(";")[0] != "text/event-stream":
                raise not_this_service(response)
            yield response


class AsyncClient:
    """`Client` for programs that run an event loop; the same methods, awaited."""

    def __init__(
        self, base_url: str = DEFAULT_URL, *, key: str | None = None, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        url = address(base_url)
        self._http = httpx.AsyncClient(
            base_url=url, headers=authorization(key), transport=transport, trust_env=uses_proxies(url)
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def submit(self, spec: Spec, *, idempotency_key: str | None = None) -> Job:
        key = idempotency_key or str(uuid4())
        call = calls.submit(spec, key)
        for pause_s in (*SUBMIT_PAUSES_S, None):
            try:
                return await self._send(call)
            except ServiceError as error:
                if not may_have_arrived(error):
                    raise
                if pause_s is None:
                    raise unknown_whether_created(error, key) from error
                await asyncio.sleep(pause_s)
        raise AssertionError("the last try returns or raises")

    async def list_jobs(
        self, *, page_size: int | None = None, page_token: str | None = None, phase: str | None = None
    ) -> JobPage:
        return await self._send(calls.list_jobs(page_size, page_token, phase))

    async def get(self, job_id: str) -> Job:
        return await self._send(calls.get(job_id))

    async def cancel(self, job_id: str) -> Job:
        return await self._send(calls.cancel(job_id))

    async def events(
        self, job_id: str, *, after: int = 0, limit: int = 100, newest_of: Iterable[str] = ()
    ) -> EventPage:
        return await self._send(calls.events(job_id, after, limit, newest_of))

    async def metrics(
        self,
        job_id: str,
        *,
        names: Iterable[str] = (),
        from_step: int = 0,
        to_step: int | None = None,
        max_points: int = 1000,
    ) -> Metrics:
        return await self._send(calls.metrics(job_id, names, from_step, to_step, max_points))

    async def statistics(self, job_id: str, *, from_step: int = 0, max_points: int = 200, span: int = 1) -> Statistics:
        return await self._send(calls.statistics(job_id, from_step, max_points, span))

    async def logs(
        self, job_id: str, *, attempt: int | None = None, tail: int | None = None, rank: int | None = None
    ) -> str:
        return await self._send(calls.logs(job_id, attempt, tail, rank))

    async def ready(self) -> Health:
        return await self._send(calls.ready())

    async def _send(self, call: Call[Answer]) -> Answer:
        try:
            return read_answer(await self._http.send(request_of(self._http, call)), call)
        except httpx.RequestError as error:
            raise unreachable(self._http.base_url, error) from error
