"""What the client makes of an address where no service answers, or something else does."""

import asyncio
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from ngd_service.client.client import (
    AsyncClient,
    Client,
    NotFoundError,
    NotThisServiceError,
    ServiceError,
    ServiceUnreachableError,
)
from tests.service.test_cli import ngd
from tests.support.attempts import small_spec
from tests.support.service_process import ServiceProcess

NOBODY = "http://127.0.0.1:1"


class OtherProgram(BaseHTTPRequestHandler):
    """Answers everything with a page, or sends the caller elsewhere."""

    def do_GET(self) -> None:
        is_moved = "moved" in self.path
        self.send_response(302 if is_moved else 200)
        self.send_header("Location" if is_moved else "Content-Type", "/elsewhere" if is_moved else "text/html")
        self.end_headers()
        self.wfile.write(b"<p>hello</p>")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def other_program() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), OtherProgram)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


CALLS: list[Callable[[Client], object]] = [
    lambda client: client.get("job_x"),
    lambda client: client.get("moved"),
    lambda client: list(client.watch("job_x")),
    lambda client: list(client.follow("moved")),
    lambda client: list(client.follow_logs("job_x")),
]


@pytest.mark.parametrize("call", CALLS)
def test_another_program_at_the_address_is_told_apart(other_program: str, call: Callable[[Client], object]) -> None:
    with Client(other_program) as client, pytest.raises(NotThisServiceError, match=r"is not an ngd service.*--url"):
        call(client)


@pytest.mark.parametrize("call", CALLS)
def test_nobody_at_the_address_is_said_once_patience_is_over(call: Callable[[Client], object]) -> None:
    with Client(NOBODY, patience_s=0) as client, pytest.raises(ServiceUnreachableError, match="no service answers"):
        call(client)


def test_follower_gives_up_when_the_service_does_not_come_back(start_service: Callable[..., ServiceProcess]) -> None:
    service = start_service()
    spec = small_spec(name="waits").model_dump(mode="json")
    with Client(service.url, patience_s=0.5) as client:
        running = client.watch(client.submit(spec).id)
        next(running)
        service.kill()

        with pytest.raises(ServiceUnreachableError, match="no service answers"):
            list(running)
    start_service()  # whose end stops the job


class Losing(httpx.BaseTransport):
    """Carries requests out, and loses the first answers to a post: the caller has timed out by then."""

    def __init__(self, lost: int) -> None:
        self._inner = httpx.HTTPTransport()
        self._lost = lost

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = self._inner.handle_request(request)
        answer.read()
        if request.method == "POST" and self._lost:
            self._lost -= 1
            raise httpx.ReadTimeout("timed out", request=request)
        return answer

    def close(self) -> None:
        self._inner.close()


@pytest.fixture
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ngd_service.client.asynchronous.SUBMIT_PAUSES_S", (0.0, 0.0))


@pytest.mark.usefixtures("without_pauses")
def test_post_whose_answers_are_lost_makes_one_job(shared_service: ServiceProcess) -> None:
    before = len(shared_service.client.list_jobs(page_size=1000).jobs)
    spec = small_spec(name="steps", schedule={"steps": 1}).model_dump(mode="json")

    with Client(shared_service.url, transport=Losing(lost=2)) as client:
        job = client.submit(spec)

    assert len(shared_service.client.list_jobs(page_size=1000).jobs) == before + 1
    assert shared_service.client.get(job.id).name == "steps"


@pytest.mark.usefixtures("without_pauses")
def test_post_that_is_given_up_says_how_to_repeat_it(shared_service: ServiceProcess) -> None:
    before = len(shared_service.client.list_jobs(page_size=1000).jobs)
    spec = small_spec(name="steps", schedule={"steps": 1}).model_dump(mode="json")
    with (
        Client(shared_service.url, transport=Losing(lost=3)) as client,
        pytest.raises(ServiceUnreachableError, match="submit it again with --idempotency-key") as caught,
    ):
        client.submit(spec)
    (key,) = re.findall(r"--idempotency-key (\S+),", str(caught.value))

    job = shared_service.client.submit(spec, idempotency_key=key)

    assert [job.id] == [job.id for job in shared_service.client.list_jobs(page_size=1000).jobs[:1]]
    assert len(shared_service.client.list_jobs(page_size=1000).jobs) == before + 1


def test_two_posts_make_two_jobs(client: Client) -> None:
    spec = small_spec(name="steps", schedule={"steps": 1}).model_dump(mode="json")

    assert client.submit(spec).id != client.submit(spec).id


@pytest.mark.parametrize("url", ["", "nonsense", "ftp://127.0.0.1", "http://", "http://127.0.0.1:port"])
def test_address_that_is_none_is_shown(url: str) -> None:
    with pytest.raises(ServiceError, match=r"no address of a service; give one such as http"):
        Client(url)


@pytest.mark.parametrize("job_id", ["a/b", "../../healthz", "a?b", "a#b", "ü", "a b", ""])
def test_id_is_never_more_than_one_part_of_the_path(client: Client, job_id: str) -> None:
    with pytest.raises(NotFoundError):
        client.get(job_id)


def test_proxy_of_the_environment_does_not_stand_between(
    shared_service: ServiceProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", NOBODY)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)

    with Client(shared_service.url) as client:
        assert client.ready().status == "ok"


@pytest.mark.parametrize(
    "arguments", [("logs", "job_x", "-f"), ("logs", "job_x"), ("get", "job_x"), ("cancel", "job_x"), ("jobs",)]
)
def test_command_ends_with_one_message(arguments: tuple[str, ...]) -> None:
    result = ngd(*arguments, url=NOBODY)

    assert result.returncode == 1
    assert "no service answers" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_asynchronous_client_has_the_same_calls(shared_service: ServiceProcess) -> None:
    spec = small_spec(name="steps", schedule={"steps": 2}).model_dump(mode="json")

    async def run() -> tuple[str, list[str], list[int], int]:
        async with AsyncClient(shared_service.url) as client:
            job = await client.submit(spec)
            phases = [seen.status.phase async for seen in client.watch(job.id)]
            ended = await client.wait(job.id, timeout_s=10)
            events = [event.id async for event in client.follow(job.id)]
            size = len(b"".join([piece async for piece in client.download_log(job.id)]))
            return ended.id, phases, events, size

    job_id, phases, events, size = asyncio.run(run())

    assert phases[-1] == "SUCCEEDED"
    assert events == [event.id for event in shared_service.client.follow(job_id)]
    assert size == len(b"".join(shared_service.client.download_log(job_id)))


def test_stream_that_is_left_is_closed(shared_service: ServiceProcess) -> None:
    spec = small_spec(name="steps", schedule={"steps": 2}).model_dump(mode="json")
    with Client(shared_service.url) as client:
        seen = client.watch(client.submit(spec).id)
        next(seen)

        seen.close()

        assert client._http._transport._pool.connections == []


def test_text_may_hold_the_line_ends_of_other_languages() -> None:
    chunk = {"attempt": 1, "text": "one\u2028two\x85three\n", "end": 12}
    lines = (
        f"event: log\ndata: {json.dumps(chunk, ensure_ascii=False)}\n\nid: 3\n\n: ping\n\nevent: end\ndata: {{}}\n\n"
    )
    headers = {"Content-Type": "text/event-stream"}
    transport = httpx.MockTransport(lambda _: httpx.Response(200, headers=headers, content=lines.encode()))

    with Client(transport=transport) as client:
        assert [part.text for part in client.follow_logs("job_x")] == [chunk["text"]]
