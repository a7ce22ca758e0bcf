"""The question that each container asks itself: its exit status is all that Docker sees."""

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support import ROOT

SCRIPT = ROOT / "docker" / "healthcheck.py"


@contextmanager
def answering(status: int) -> Iterator[tuple[str, list[str]]]:
    """Yields the port of a server that answers with this status, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_arguments: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield str(server.server_port), asked
        finally:
            server.shutdown()
            thread.join()


def check(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_service_that_answers_is_healthy_whatever_proxy_is_set() -> None:
    with answering(200) as (port, asked):
        result = check("service", NGD_PORT=port, http_proxy="http://127.0.0.1:1", HTTP_PROXY="http://127.0.0.1:1")

    assert (result.returncode, asked) == (0, ["/healthz"])


def test_ray_node_is_asked_at_its_agent() -> None:
    with answering(200) as (port, asked):
        result = check("ray", port)

    assert (result.returncode, asked) == (0, ["/api/healthz"])


@pytest.mark.parametrize("status", [500, 503, 401])
def test_other_answers_are_unhealthy(status: int) -> None:
    with answering(status) as (port, _):
        result = check("service", NGD_PORT=port)

    assert result.returncode == 1
    assert f"GET /healthz on port {port} answered {status}" in result.stderr


def test_silence_is_unhealthy() -> None:
    with answering(200) as (port, _):
        pass
    result = check("service", NGD_PORT=port)

    assert result.returncode == 1
    assert f"nothing healthy answers on port {port}" in result.stderr


@pytest.mark.parametrize("arguments", [(), ("database",), ("service", "80"), ("ray", "1", "2")])
def test_other_words_are_refused(arguments: tuple[str, ...]) -> None:
    result = check(*arguments)

    assert result.returncode == 1
    assert "usage: healthcheck.py service | ray [AGENT_PORT]" in result.stderr
