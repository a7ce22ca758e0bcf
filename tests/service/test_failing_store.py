"""A database that stops answering is a 503 that says to try again; a mistake of ours is a 500 without a traceback."""

import asyncio
from collections.abc import Callable

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Message, Receive, Scope, Send

from ngd_service.api.container import Container
from ngd_service.api.same_origin import SameOriginOnly


def get(app: FastAPI, path: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.get(path)

    return asyncio.run(ask())


def parts(app: FastAPI) -> Container:
    found: Container = app.state.container
    return found


def lose(app: FastAPI) -> None:
    """The disk of the database is gone for now."""
    parts(app).store.close()
    file = parts(app).settings.home / "ngd.sqlite"
    file.rename(file.with_name("elsewhere"))
    file.mkdir()


def spoil(app: FastAPI) -> None:
    parts(app).store.close()
    (parts(app).settings.home / "ngd.sqlite").write_bytes(b"no longer a database" * 100)


def test_lost_database_is_a_problem_to_try_again(app: FastAPI) -> None:
    lose(app)

    answer = get(app, "/api/v1/jobs")

    assert (answer.status_code, answer.json()["code"], answer.json()["retryable"]) == (503, "store_unavailable", True)
    assert answer.headers["retry-after"] == "1"


def test_spoilt_database_is_no_problem_to_try_again(app: FastAPI) -> None:
    spoil(app)

    answer = get(app, "/api/v1/jobs")

    assert (answer.status_code, answer.json()["retryable"]) == (500, False)
    assert "Traceback" not in answer.text


@pytest.mark.parametrize("harm", [lose, spoil])
def test_lost_database_makes_the_service_not_ready_but_alive(app: FastAPI, harm: Callable[[FastAPI], None]) -> None:
    harm(app)

    ready = get(app, "/readyz")

    assert (ready.status_code, ready.json()["status"]) == (503, "unavailable")
    assert "database" in ready.json()["checks"]["database"]
    assert get(app, "/healthz").status_code == 200


def test_reconciler_that_hangs_makes_the_service_not_ready(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts(app).reconciler, "_ticked_at", parts(app).reconciler._ticked_at - 3600)

    assert "last tick 36" in get(app, "/readyz").json()["checks"]["reconciler"]


def test_our_own_mistake_is_a_problem_without_a_traceback(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(parts(app).jobs), "get", lambda *_: 1 / 0)

    answer = get(app, "/api/v1/jobs/job_x")

    assert (answer.status_code, answer.json()["code"]) == (500, "internal_server_error")
    assert answer.headers["content-type"] == "application/problem+json"
    assert "Zero" not in answer.text
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("headers", "is_let_in"),
    [({"host": "localhost:8000", "origin": "http://localhost:8000"}, True), ({"host": "evil.example"}, False)],
)
def test_socket_that_a_page_of_another_site_opens_is_closed(headers: dict[str, str], is_let_in: bool) -> None:
    sent: list[Message] = []

    async def inside(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    guarded = SameOriginOnly(inside, public_url="", is_loopback=True)
    asyncio.run(guarded({"type": "websocket", "headers": raw}, receive, send))

    assert [message["type"] for message in sent] == ["websocket.accept" if is_let_in else "websocket.close"]
