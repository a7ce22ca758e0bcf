"""Requests that do not arrive keep nobody out; what the framework refuses is a problem too."""

import contextlib
import json
import os
import resource
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from websockets.sync.client import connect

from tests.support.attempts import small_spec
from tests.support.deadline import wait_until
from tests.support.service_process import ServiceProcess

ARRIVAL_S = 2.0  # a busy machine may take a second to look at what has arrived
HEAD = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n"
POST = b"POST /api/v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n"
SOCKET_PATH = "/_nicegui_ws/socket.io/?EIO=4&transport=websocket"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    home = tmp_path_factory.mktemp("connections")
    service = ServiceProcess(home, arrival_s=ARRIVAL_S, max_connections=100, cancel_grace_s=0)
    yield service
    service.close()


def num_sockets(pid: int) -> int:
    with contextlib.suppress(FileNotFoundError):  # one is closed while they are counted
        return sum(os.readlink(link).startswith("socket:") for link in Path(f"/proc/{pid}/fd").iterdir())
    return sys.maxsize


def send(service: ServiceProcess, text: bytes) -> socket.socket:
    """Returns a new connection to the service on which the text was sent."""
    address = urlsplit(service.url)
    assert address.hostname is not None
    connection = socket.create_connection((address.hostname, address.port or 80), timeout=30)
    connection.sendall(text)
    return connection


def answer(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Returns status, headers and body of what comes until the service closes."""
    with connection, connection.makefile("rb") as file:
        head, _, body = file.read().partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), dict(line.lower().split(": ", 1) for line in lines), body


@pytest.mark.parametrize(
    "sent", [b"", b"GE", HEAD, POST, POST + b'{"a"', HEAD + b"\r\n" + HEAD], ids=lambda sent: str(len(sent))
)
def test_request_that_does_not_arrive_is_cut(service: ServiceProcess, sent: bytes) -> None:
    connection = send(service, sent)
    if sent.count(b"HTTP/1.1") == 2:  # the first of the two is whole
        first = b""
        while b'"checks":{}}' not in first:
            first += connection.recv(4096)

    status, headers, body = answer(connection)

    assert (status, headers["content-type"]) == (408, "application/problem+json")
    assert json.loads(body)["detail"] == "the request did not arrive within 2 s; send it again"


def test_long_body_that_keeps_coming_may_take_its_time(service: ServiceProcess) -> None:
    piece = bytes(64 << 10)
    head = f"PUT /api/v1/code/{'0' * 64} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {8 * len(piece)}\r\n"
    connection = send(service, f"{head}Connection: close\r\n\r\n".encode())
    for _ in range(8):
        time.sleep(ARRIVAL_S / 4)  # twice as long as a request may take that does not come
        connection.sendall(piece)

    status, _, body = answer(connection)

    assert (status, json.loads(body)["code"]) == (422, "archive_differs")  # all of it was read


def test_half_sent_requests_keep_nobody_out(service: ServiceProcess) -> None:
    """As many as were enough, of a process with 256 file descriptors."""
    pid = service.process.pid
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (256, hard))

    with contextlib.ExitStack() as held:
        for _ in range(300):
            held.enter_context(send(service, HEAD))

        assert httpx.get(f"{service.url}/healthz", timeout=60).status_code == 200
        wait_until(lambda: num_sockets(pid) < 128, "there are no more connections than there may be")


def test_connections_that_are_all_answered_leave_no_place(service: ServiceProcess) -> None:
    """Whoever comes then is told so, and is let in once one has gone."""
    job = service.client.submit(small_spec(name="waits").model_dump(mode="json"))
    stream = f"GET /api/v1/jobs/{job.id}/events/stream HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
    with contextlib.ExitStack() as held:
        waiting = [held.enter_context(send(service, stream)) for _ in range(100)]
        for connection in waiting:
            assert connection.recv(12) == b"HTTP/1.1 200"

        with socket.create_connection(waiting[0].getpeername(), timeout=30) as late:
            refused = late.recv(4096)

    assert refused.startswith(b"HTTP/1.1 503 ")
    assert b'"the service has as many connections as it takes; try again"' in refused
    wait_until(lambda: httpx.get(f"{service.url}/healthz").status_code == 200, "there is room again")
    service.client.cancel(job.id)


def test_answers_that_take_longer_than_a_request_may_are_not_cut(service: ServiceProcess) -> None:
    job = service.client.submit(small_spec(name="waits").model_dump(mode="json"))
    url = service.url.replace("http", "ws") + SOCKET_PATH

    with connect(url, proxy=None) as page:
        assert str(page.recv()).startswith("0{")
        assert not service.client.wait(job.id, timeout_s=2 * ARRIVAL_S).status.is_terminal
        page.ping().wait(30)

    service.client.cancel(job.id)


def test_head_that_never_ends_is_refused(service: ServiceProcess) -> None:
    with send(service, HEAD) as connection, pytest.raises((BrokenPipeError, ConnectionResetError)):
        _send_for_ever(connection, b"X-More: " + b"x" * 8192 + b"\r\n")


@pytest.mark.parametrize("method", ["TRACE", "OPTIONS", "PATCH", "DELETE", "HEAD", "NEW"])
@pytest.mark.parametrize("path", ["/healthz", "/metrics", "/", "/jobs/job_x", "/_nicegui/x", "/api/v1/jobs", "/none"])
def test_method_that_a_path_does_not_take_is_a_problem(service: ServiceProcess, method: str, path: str) -> None:
    answer = httpx.request(method, service.url + path)

    if method == "HEAD" and path in ("/healthz", "/metrics", "/_nicegui/x"):
        return
    assert answer.status_code == (400 if method == "NEW" else 405)
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("path", ["/healthz", "/", "/api/v1/jobs", "/api/v1/none"])
def test_browsers_are_told_what_they_may_do_with_an_answer(service: ServiceProcess, path: str) -> None:
    headers = httpx.get(service.url + path).headers

    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_probe_with_a_parameter_is_answered(service: ServiceProcess, path: str) -> None:
    assert httpx.get(f"{service.url}{path}?x=1").status_code == 200


def _send_for_ever(connection: socket.socket, text: bytes) -> None:
    while True:
        connection.sendall(text)
