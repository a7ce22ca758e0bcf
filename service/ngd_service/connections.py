"""The service's sockets: how many there may be, and how long a request may take to arrive.

uvicorn waits for the rest of a request for as long as the connection lives, so that a few hundred half-sent ones would
take every file descriptor. Here they have a time, and where there are as many connections as there may be, a new one
takes the place of the one that has kept silent longest.
"""

import asyncio
import resource
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from ulid import ULID
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ngd_service.errors import ProblemError, as_problem, problem_of_status

__all__ = ["BROWSER_HEADERS", "Connection", "Limits"]

MAX_HEADER_BYTES = 64 << 10
MIN_BYTES_PER_S = 16 << 10  # a body that keeps coming at this rate is let go on; BodyLimit bounds it
# What browsers are told with each answer: no page of another site frames one, and none is read as another type.
BROWSER_HEADERS = [("Content-Security-Policy", "frame-ancestors 'none'"), ("X-Content-Type-Options", "nosniff")]


@dataclass(frozen=True, slots=True)
class Limits:
    """What the connections of one server may take. arrival_s: within which a request has to be there whole, or to
    go on coming.
    """

    max_connections: int
    arrival_s: float

    @property
    def num_connections(self) -> int:
        """How many there may be: at most half of the process's file descriptors, for files and databases need some."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return self.max_connections if soft == resource.RLIM_INFINITY else min(self.max_connections, soft // 2)


class Connection(HttpToolsProtocol):
    """uvicorn's connection, which is closed where its request does not arrive; refusals are problems."""

    def __init__(self, *, limits: Limits, **given: Any) -> None:
        super().__init__(**given)
        self._limits = limits
        self._timer: asyncio.TimerHandle | None = None  # runs while a request is arriving
        self._header_bytes: int | None = 0  # None: the headers are there
        self._arrived_bytes = 0  # since the timer started
        self.quiet_since_s: float | None = self.loop.time()  # None: it is being answered

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()
        if len(self.connections) > self._limits.num_connections and not self._close_quietest():
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "the service has as many connections as it takes; try again")

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._arrived_bytes += len(data)
        super().data_received(data)
        if self._header_bytes is None or self.transport.is_closing():
            return
        self._header_bytes += len(data)
        if self._header_bytes > MAX_HEADER_BYTES:
            detail = f"the request's head is longer than {MAX_HEADER_BYTES:,} bytes; shorten its address or headers"
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, detail)

    def send_400_response(self, msg: str) -> None:
        self._refuse(HTTPStatus.BAD_REQUEST, "this is no HTTP/1.1 request that the service can read")

    def on_message_begin(self) -> None:
        self._header_bytes = 0
        self._start_timer()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._header_bytes = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._stop_timer()
        self.quiet_since_s = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self.quiet_since_s = self.loop.time()
        super().on_response_complete()

    def handle_websocket_upgrade(self) -> None:
        self._stop_timer()
        super().handle_websocket_upgrade()

    def _start_timer(self) -> None:
        if self._timer is None:
            self._arrived_bytes = 0
            self._timer = self.loop.call_later(self._limits.arrival_s, self._on_late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_late(self) -> None:
        self._timer = None
        is_read = self.cycle is not None and not self.cycle.response_complete
        goes_on = is_read and self._arrived_bytes >= MIN_BYTES_PER_S * self._limits.arrival_s
        if self.flow.read_paused or goes_on:  # paused: the rest may be there, and nobody has read it yet
            self._start_timer()
        elif not self.transport.is_closing():
            detail = f"the request did not arrive within {self._limits.arrival_s:g} s; send it again"
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, detail)

    def _close_quietest(self) -> bool:
        """Closes the connection that has kept silent longest. Returns whether there was another one than this."""
        quiet = [
            (connection.quiet_since_s, id(connection), connection)
            for connection in self.connections
            if isinstance(connection, Connection) and connection is not self and connection.quiet_since_s is not None
        ]
        if not quiet:
            return False
        _, _, quietest = min(quiet)
        self.connections.discard(quietest)
        quietest.transport.abort()
        return True

    def _refuse(self, status: HTTPStatus, detail: str) -> None:
        """Answers before the application has, and closes; an answer that has begun is cut short instead."""
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            self.transport.write(self._refusal(problem_of_status(status, detail)))
        self.transport.close()

    def _refusal(self, error: ProblemError) -> bytes:
        problem = as_problem(error, instance="", request_id=f"req_{ULID()}")
        body = problem.model_dump_json().encode()
        head = [
            *self.server_state.default_headers,
            (b"content-type", b"application/problem+json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        lines = [f"HTTP/1.1 {error.status} {error.status.phrase}".encode(), *(b": ".join(line) for line in head)]
        return b"\r\n".join([*lines, b"", body])
