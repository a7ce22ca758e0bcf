"""The Python SDK over the REST API: `Client`, and `AsyncClient` for programs that run an event loop.

    with Client("http://127.0.0.1:8000") as client:  # key="...", if the service wants one
        job = client.submit(Path("digits.yaml").read_text())  # ship() first, if it has code
        for job in client.watch(job.id):
            print(job.status.progress.step, job.metrics_latest.get("loss"))

The errors that they raise are in answers.py.
"""

import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import httpx

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
    uses_proxies,
)
from ngd_service.client.asynchronous import PATIENCE_S, AsyncClient

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

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


class _Body(httpx.AsyncByteStream):
    def __init__(self, response: httpx.Response) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._response.iter_bytes():
            yield piece

    async def aclose(self) -> None:
        self._response.close()


class _Through(httpx.AsyncBaseTransport):
    """Sends by a blocking client, so that no coroutine above it ever waits for an event loop."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = self._http.send(request, stream=True)
        headers = response.headers.copy()
        headers.pop("Content-Encoding", None)  # the blocking client has decoded it
        return httpx.Response(response.status_code, headers=headers, stream=_Body(response))


class _BlockingCalls(AsyncClient):
    """`AsyncClient` whose coroutines block instead of suspending: the first step of each one is its last."""

    def __init__(self, http: httpx.Client, patience_s: float) -> None:
        self._http = httpx.AsyncClient(base_url=http.base_url, headers=http.headers, transport=_Through(http))
        self._patience_s = patience_s

    async def _apart(
        self, work: Callable[Arguments, Answer], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Answer:
        return work(*args, **kwargs)

    async def _sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def _result(coroutine: Coroutine[Any, Any, Answer]) -> Answer:
    try:
        coroutine.send(None)
    except StopIteration as end:
        answer: Answer = end.value
        return answer
    raise AssertionError("a blocking call has nothing to wait for")


def _answers(
    method: Callable[Concatenate[AsyncClient, Arguments], Coroutine[Any, Any, Answer]],
) -> Callable[Concatenate["Client", Arguments], Answer]:
    @wraps(method)
    def call(client: "Client", /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
        return _result(method(client._calls, *args, **kwargs))

    return call


def _yields(
    method: Callable[Concatenate[AsyncClient, Arguments], AsyncIterator[Answer]],
) -> Callable[Concatenate["Client", Arguments], Iterator[Answer]]:
    @wraps(method)
    def call(client: "Client", /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Iterator[Answer]:
        items: Any = method(client._calls, *args, **kwargs)
        try:
            while True:
                try:
                    item: Answer = _result(items.__anext__())
                except StopAsyncIteration:
                    return
                yield item
        finally:
            _result(items.aclose())

    return call


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
        self._calls = _BlockingCalls(self._http, patience_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    @property
    def base_url(self) -> str:
        return self._calls.base_url

    submit = _answers(AsyncClient.submit)
    ship = _answers(AsyncClient.ship)
    send_code = _answers(AsyncClient.send_code)
    validate = _answers(AsyncClient.validate)
    plan = _answers(AsyncClient.plan)
    code = _answers(AsyncClient.code)
    list_jobs = _answers(AsyncClient.list_jobs)
    get = _answers(AsyncClient.get)
    wait = _answers(AsyncClient.wait)
    cancel = _answers(AsyncClient.cancel)
    events = _answers(AsyncClient.events)
    history = _answers(AsyncClient.history)
    follow = _yields(AsyncClient.follow)
    watch = _yields(AsyncClient.watch)
    metrics = _answers(AsyncClient.metrics)
    statistics = _answers(AsyncClient.statistics)
    anatomy = _answers(AsyncClient.anatomy)
    logs = _answers(AsyncClient.logs)
    log_part = _answers(AsyncClient.log_part)
    download_log = _yields(AsyncClient.download_log)
    checkpoints = _answers(AsyncClient.checkpoints)
    pin = _answers(AsyncClient.pin)
    unpin = _answers(AsyncClient.unpin)
    download_file = _yields(AsyncClient.download_file)
    follow_logs = _yields(AsyncClient.follow_logs)
    ready = _answers(AsyncClient.ready)
