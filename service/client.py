"""The Python SDK over the REST API: `Client`, and `AsyncClient` for programs that run an event loop.

    with Client("http://127.0.0.1:8000") as client:  # key="...", if the service wants one
        job = client.submit(Path("digits.yaml").read_text())
        for job in client.watch(job.id):
            print(job.status.progress.step, job.metrics_latest.get("loss"))

The error tree:

    ServiceError
        ServiceUnreachableError        nothing answers at the address
        NotThisServiceError            something else answers there
        InvalidKeyError                what was given as an API key can't be one
        RequestRefusedError            the service answered with a problem
            InvalidRequestError        400, 413, 415, 422: change the request
            UnauthorizedError          401: no API key, or none of this service's
            NotFoundError              404
            ConflictError              409: not in the job's present state
            ServiceFailedError         5xx: the service's own trouble
"""

import ipaddress
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Self, TypeVar

import httpx
from pydantic import ValidationError

from service import calls
from service.calls import Call, Spec
from service.resources import Event, EventPage, Health, Job, JobPage, LogChunk, Metrics, Problem, Statistics, Validated
from service.server_sent import Frame, frames

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
DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_S = 30.0
LONG_POLL_S = 30.0
RECONNECT_S = 1.0
PATIENCE_S = 60.0  # a restart of the service takes seconds
STREAM_TIMEOUT = httpx.Timeout(10.0, read=60.0)  # the service sends a comment every 15 s when nothing happens


class ServiceError(Exception):
    """Base of what the client raises."""


class ServiceUnreachableError(ServiceError, ConnectionError):
    """Nothing answers at the address."""


class NotThisServiceError(ServiceError):
    """What answers at the address is something else."""


class InvalidKeyError(ServiceError, ValueError):
    """What was given as an API key can't be one."""


class RequestRefusedError(ServiceError):
    """The service answered with a problem; `problem` is the whole of it, str() the text for a person."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        lines = [f"{item.detail}" + (f" ({item.hint})" if item.hint else "") for item in problem.errors]
        super().__init__("\n".join(lines or [problem.detail]))


class InvalidRequestError(RequestRefusedError, ValueError):
    """The request itself is wrong: change it."""


class UnauthorizedError(RequestRefusedError, PermissionError):
    """The service wants an API key, or another one."""


class NotFoundError(RequestRefusedError, LookupError):
    """There is no such job or route."""


class ConflictError(RequestRefusedError):
    """Not possible in the job's present state."""


class ServiceFailedError(RequestRefusedError):
    """The service's own trouble; `problem.retryable` says whether to try again."""


def _base_url(given: str) -> httpx.URL:
    """Returns the address of a service. Raises: ServiceUnreachableError for what is no address."""
    try:
        url = httpx.URL(given)
        is_address = url.scheme in ("http", "https") and bool(url.host)
    except httpx.InvalidURL:
        is_address = False
    if not is_address:
        raise ServiceUnreachableError(f"{given!r} is no address of a service; give one such as {DEFAULT_URL}")
    return url


def _uses_proxies(url: httpx.URL) -> bool:
    """Returns whether http_proxy and its like count: a proxy elsewhere can't reach this machine's own addresses."""
    try:
        return not (url.host == "localhost" or ipaddress.ip_address(url.host).is_loopback)
    except ValueError:
        return True


def _authorization(key: str | None) -> dict[str, str]:
    """Returns the header that carries the key. Raises: InvalidKeyError for what no header carries."""
    if key is None:
        return {}
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable():
        raise InvalidKeyError("the API key must be visible ASCII characters; check that the whole of it was given")
    return {"Authorization": f"Bearer {key}"}


def _refused(response: httpx.Response) -> RequestRefusedError:
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        detail = f"{response.request.url} answered {response.status_code} and is not this service"
        problem = Problem(
            type="about:blank",
            title=response.reason_phrase,
            status=response.status_code,
            detail=detail,
            instance=response.request.url.path,
            code="not_this_service",
            request_id="",
            retryable=False,
        )
    kinds = {401: UnauthorizedError, 404: NotFoundError, 409: ConflictError}
    default = ServiceFailedError if response.status_code >= 500 else InvalidRequestError
    return kinds.get(response.status_code, default)(problem)


def _not_this_service(response: httpx.Response) -> NotThisServiceError:
    return NotThisServiceError(
        f"what answers at {response.request.url} is not an ngd service; give the service's address with --url, or set "
        "NGD_HOST and NGD_PORT"
    )


def _unreachable(base_url: httpx.URL, error: httpx.RequestError) -> ServiceUnreachableError:
    reason = str(error) or type(error).__name__
    return ServiceUnreachableError(f"no service answers at {base_url} ({reason}); start one with: ngd serve")


def _request(client: httpx.Client | httpx.AsyncClient, call: Call[Answer]) -> httpx.Request:
    return client.build_request(
        call.method,
        call.path,
        params=call.params,
        headers=call.headers,
        json=call.json,
        content=call.content,
        timeout=call.timeout_s or TIMEOUT_S,
    )


def _read(response: httpx.Response, call: Call[Answer]) -> Answer:
    _check(response)
    try:
        return call.read(response.content)
    except ValidationError as error:
        raise _not_this_service(response) from error


def _check(response: httpx.Response) -> None:
    if response.status_code >= 400:
        raise _refused(response)
    if not response.is_success:
        raise _not_this_service(response)


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
        url = _base_url(base_url)
        self._http = httpx.Client(
            base_url=url, headers=_authorization(key), transport=transport, trust_env=_uses_proxies(url)
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
        """Returns the new job. spec: a mapping, or YAML or JSON text. The same key and spec return the same job."""
        return self._send(calls.submit(spec, idempotency_key))

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
        self, job_id: str, *, names: Iterable[str] = (), from_step: int | None = None, max_points: int | None = None
    ) -> Metrics:
        """Returns curves. names: empty for all; "seconds" and "bytes_sent" stand for each of their parts."""
        return self._send(calls.metrics(job_id, names, from_step, max_points))

    def statistics(self, job_id: str, *, from_step: int = 0, max_points: int = 200, span: int = 1) -> Statistics:
        return self._send(calls.statistics(job_id, from_step, max_points, span))

    def logs(self, job_id: str, *, attempt: int | None = None, tail: int | None = None) -> str:
        """Returns the log of the newest, or the given, attempt; tail: its last lines alone."""
        return self._send(calls.logs(job_id, attempt, tail))

    def follow_logs(self, job_id: str, *, attempt: int | None = None, tail: int | None = None) -> Iterator[LogChunk]:
        """Yields the log as it grows, until the job has ended; goes on to later attempts if none was named."""
        path, params = calls.log_stream(job_id, attempt, tail)
        try:
            with self._stream(path, params=params) as response:
                for frame in frames(response.iter_lines()):
                    if frame.event == "log":
                        yield LogChunk.model_validate_json(frame.data)
        except httpx.RequestError as error:
            raise _unreachable(self._http.base_url, error) from error

    def ready(self) -> Health:
        return self._send(calls.ready())

    def _send(self, call: Call[Answer]) -> Answer:
        try:
            return _read(self._http.send(_request(self._http, call)), call)
        except httpx.RequestError as error:
            raise _unreachable(self._http.base_url, error) from error

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
                trouble = _unreachable(self._http.base_url, error)
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
            _check(response)
            if response.headers.get("content-type", "").partition(";")[0] != "text/event-stream":
                raise _not_this_service(response)
            yield response


class AsyncClient:
    """`Client` for programs that run an event loop; the same methods, awaited."""

    def __init__(
        self, base_url: str = DEFAULT_URL, *, key: str | None = None, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        url = _base_url(base_url)
        self._http = httpx.AsyncClient(
            base_url=url, headers=_authorization(key), transport=transport, trust_env=_uses_proxies(url)
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def submit(self, spec: Spec, *, idempotency_key: str | None = None) -> Job:
        return await self._send(calls.submit(spec, idempotency_key))

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
        self, job_id: str, *, names: Iterable[str] = (), from_step: int | None = None, max_points: int | None = None
    ) -> Metrics:
        return await self._send(calls.metrics(job_id, names, from_step, max_points))

    async def statistics(self, job_id: str, *, from_step: int = 0, max_points: int = 200, span: int = 1) -> Statistics:
        return await self._send(calls.statistics(job_id, from_step, max_points, span))

    async def logs(self, job_id: str, *, attempt: int | None = None, tail: int | None = None) -> str:
        return await self._send(calls.logs(job_id, attempt, tail))

    async def ready(self) -> Health:
        return await self._send(calls.ready())

    async def _send(self, call: Call[Answer]) -> Answer:
        try:
            return _read(await self._http.send(_request(self._http, call)), call)
        except httpx.RequestError as error:
            raise _unreachable(self._http.base_url, error) from error
