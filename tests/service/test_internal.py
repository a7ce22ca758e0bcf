"""What a worker posts is read once it is known whose it is, and then checked like any other input."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from ngd_service.resources import Job
from tests.support.attempts import small_spec
from tests.support.deadline import wait_until
from tests.support.service_process import ServiceProcess

WAITS = small_spec(name="waits").model_dump(mode="json")
MANY = 7 << 20


@pytest.fixture(scope="module")
def job(shared_service: ServiceProcess) -> Iterator[Job]:
    """A job whose driver tells nothing while it runs."""
    client = shared_service.client
    job = client.submit(WAITS)
    wait_until(lambda: client.get(job.id).status.phase == "RUNNING", "the job runs")
    yield job
    client.cancel(job.id)


def post(service: ServiceProcess, job: Job, body: bytes) -> httpx.Response:
    facts = json.loads((service.home / "runs" / job.id / "attempts" / "1" / "attempt.json").read_text())
    headers = {"Authorization": f"Bearer {facts['token']}", "Content-Type": "application/json"}
    url = f"{service.url}/api/v1/internal/attempts/{job.id}-a1/events"
    return httpx.post(url, content=body, headers=headers, timeout=60, trust_env=False)


@pytest.mark.parametrize("authorization", ["", "Authorization: Bearer wrong\r\n"])
def test_body_of_whoever_has_no_token_is_not_waited_for(shared_service: ServiceProcess, authorization: str) -> None:
    host, port = shared_service.url.removeprefix("http://").split(":")
    request = (
        f"POST /api/v1/internal/attempts/job_x-a1/events HTTP/1.1\r\nHost: {host}:{port}\r\n{authorization}"
        f"Content-Type: application/json\r\nContent-Length: {MANY}\r\n\r\n"
    )

    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(request.encode() + b"[")  # and no more: an answer needs none of it
        status = connection.makefile("rb").readline()

    assert status.split()[1] == b"401"


@pytest.mark.parametrize(
    ("body", "status", "code", "words"),
    [
        (b"{", 400, "malformed_body", "the body is no JSON: EOF"),
        (b"[]", 422, "invalid_parameter", "the body must be"),
        (b"{}", 422, "invalid_parameter", "events is missing"),
        (b'{"events": [], "more": 1}', 422, "invalid_parameter", "more"),
        (b'{"events": [{"seq": 0, "time_s": 1}]}', 422, "invalid_parameter", "events.0.seq must be >= 1, got 0"),
        (b" " * (8 << 20) + b"{}", 413, "body_too_large", "larger than the 8 MiB that /api/v1/internal"),
    ],
)
def test_body_that_is_no_batch_is_refused(
    shared_service: ServiceProcess, job: Job, body: bytes, status: int, code: str, words: str
) -> None:
    answer = post(shared_service, job, body)

    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert words in answer.json()["detail"]


def test_events_that_are_none_by_the_million_get_one_short_answer(shared_service: ServiceProcess, job: Job) -> None:
    problem: dict[str, Any] = post(shared_service, job, b'{"events": [' + b"1," * (MANY // 2) + b"1]}").json()

    assert [item["pointer"] for item in problem["errors"]] == ["events.0"]


def test_batch_of_a_million_lists_is_not_read(shared_service: ServiceProcess, job: Job) -> None:
    answer = post(shared_service, job, b'{"events": [' + b"[]," * (MANY // 3) + b"[]]}")

    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
    assert "a batch may hold 100,000 lists and objects" in answer.json()["detail"]


def test_empty_batch_is_acknowledged(shared_service: ServiceProcess, job: Job) -> None:
    answer = post(shared_service, job, b'{"events": []}')

    assert (answer.status_code, answer.json()["desired"]) == (200, "RUNNING")


def test_fields_of_a_later_version_of_the_workers_are_passed_over(shared_service: ServiceProcess, job: Job) -> None:
    record = {"step": 1, "time_s": 0.0, "metrics": {"loss": 0.5}, "of_tomorrow": {"a": [1]}}
    event = {"kind": "steps", "records": [record], "of_tomorrow": 1}
    seq = post(shared_service, job, b'{"events": []}').json()["acknowledged_seq"] + 1
    body = {"events": [{"seq": seq, "time_s": 0.0, "event": event, "of_tomorrow": 1}]}

    answer = post(shared_service, job, json.dumps(body).encode())

    assert answer.json()["acknowledged_seq"] == seq
    assert shared_service.client.metrics(job.id).series["loss"].values == [0.5]
