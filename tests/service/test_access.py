"""A service with API keys: who gets in where, and what those who do not are told."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from ngd_service.auth.access import SESSION_COOKIE
from ngd_service.client.client import AsyncClient, Client, InvalidKeyError, InvalidRequestError, UnauthorizedError
from tests.support.attempts import small_spec
from tests.support.deadline import wait_until
from tests.support.keys import ALICE, BOB, write_keys
from tests.support.service_process import ServiceProcess

SPEC = small_spec(name="steps", schedule={"steps": 20}).model_dump(mode="json")
PUBLIC = "https://ngd.example.com"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """One that listens on every address, behind a proxy of another name."""
    folder = tmp_path_factory.mktemp("keyed")
    keys = write_keys(folder / "keys", alice=ALICE, bob=BOB)
    service = ServiceProcess(
        folder / "home", key=ALICE, host="0.0.0.0", api_keys_dir=str(keys), public_url=PUBLIC, max_running_jobs=4
    )
    yield service
    service.close()


def ask(service: ServiceProcess, method: str, path: str, **given: object) -> httpx.Response:
    return httpx.request(method, service.url + path, trust_env=False, **given)  # type: ignore[arg-type]


def logged_in(service: ServiceProcess, key: str = ALICE) -> dict[str, str]:
    """The headers of a browser whose reader has logged in."""
    answer = ask(service, "POST", "/login", data={"key": key})
    assert answer.status_code == 303
    return {"Cookie": f"{SESSION_COOKIE}={answer.cookies[SESSION_COOKIE]}"}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/v1/jobs"),
        ("POST", "/api/v1/jobs"),
        ("GET", "/api/v1/jobs/job_x"),
        ("GET", "/api/v1/jobs/job_x/events/stream"),
        ("GET", "/api/v1/jobs/job_x/logs?follow=true"),
        ("POST", "/api/v1/jobs/job_x:cancel"),
        ("GET", "/api/v1/nothing"),
        ("GET", "/api/v1/internal"),
        ("GET", "/_nicegui/x/static/nicegui.js"),
        ("GET", "/_nicegui_ws/socket.io/"),
        ("POST", "/"),
    ],
)
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong-0123456789-0123456789"}, {"Cookie": "a=b"}])
def test_whoever_has_no_key_is_refused(
    service: ServiceProcess, method: str, path: str, headers: dict[str, str]
) -> None:
    answer = ask(service, method, path, headers=headers)

    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "--key-file" in answer.json()["detail"]


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/openapi.json"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_probes_and_the_description_need_no_key(service: ServiceProcess, method: str, path: str) -> None:
    answer = ask(service, method, path)

    assert answer.status_code == 200
    assert (answer.content == b"") == (method == "HEAD")


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/healthz"), ("DELETE", "/metrics"), ("PUT", "/login"), ("GET", "/logout")]
)
def test_open_path_is_open_for_its_own_methods_alone(service: ServiceProcess, method: str, path: str) -> None:
    answer = ask(service, method, path)

    assert answer.status_code == 401 or answer.headers["location"].startswith("/login")


def test_header_of_a_proxy_leaves_browsers_their_session(service: ServiceProcess) -> None:
    basic = {"Authorization": "Basic cHJveHk6cGFzcw=="}

    assert ask(service, "GET", "/api/v1/jobs", headers=logged_in(service) | basic).status_code == 200
    assert ask(service, "GET", "/", headers=basic).headers["location"] == "/login"


def test_login_page_needs_no_key(service: ServiceProcess) -> None:
    assert ask(service, "GET", "/login").status_code == 200


@pytest.mark.parametrize(
    ("path", "login"), [("/", "/login"), ("/jobs/job_x", "/login?next=%2Fjobs%2Fjob_x"), ("/any", "/login?next=%2Fany")]
)
def test_browser_without_a_session_is_sent_to_the_login_page(service: ServiceProcess, path: str, login: str) -> None:
    answer = ask(service, "GET", path)

    assert (answer.status_code, answer.headers["location"]) == (303, login)


def test_job_is_posted_run_and_followed_with_a_key(service: ServiceProcess) -> None:
    job = service.client.submit(SPEC)
    events = list(service.client.follow(job.id))

    assert job.created_by == "alice"
    assert events[-1].data["to"] == "SUCCEEDED"  # so the workers' reports got in, with the attempt's token
    assert "attempt 1" in "".join(chunk.text for chunk in service.client.follow_logs(job.id))
    with Client(service.url, key=BOB) as bob:
        assert bob.submit(SPEC).created_by == "bob"
        assert bob.get(job.id).created_by == "alice"


def test_idempotency_keys_are_each_holders_own(service: ServiceProcess) -> None:
    mine = service.client.submit(SPEC, idempotency_key="run-1")

    with Client(service.url, key=BOB) as bob:
        theirs = bob.submit(SPEC | {"seed": 5}, idempotency_key="run-1")

        assert theirs.created_by == "bob"
        assert bob.submit(SPEC | {"seed": 5}, idempotency_key="run-1").id == theirs.id
    assert service.client.submit(SPEC, idempotency_key="run-1").id == mine.id
    with pytest.raises(InvalidRequestError, match="'run-1' was used for another request"):
        service.client.submit(SPEC | {"seed": 6}, idempotency_key="run-1")


def test_program_with_an_event_loop_gives_its_key(service: ServiceProcess) -> None:
    async def ask(key: str | None) -> int:
        async with AsyncClient(service.url, key=key) as client:
            return len((await client.list_jobs(page_size=1)).jobs)

    assert asyncio.run(ask(ALICE)) <= 1
    with pytest.raises(UnauthorizedError, match=r"wants an API key; send it as Authorization"):
        asyncio.run(ask(None))


def test_session_reads_the_api_and_its_streams(service: ServiceProcess) -> None:
    job = service.client.submit(SPEC)
    headers = logged_in(service, BOB)

    stream = ask(service, "GET", f"/api/v1/jobs/{job.id}/events/stream", headers=headers, timeout=60)

    assert stream.status_code == 200
    assert stream.text.rstrip().endswith("event: end\ndata: {}")
    posted = ask(service, "POST", "/api/v1/jobs", json=SPEC, headers=headers | {"Origin": PUBLIC})
    assert posted.json()["created_by"] == "bob"
    assert ask(service, "GET", "/", headers=headers).status_code == 200


def test_api_key_is_no_attempts_token(service: ServiceProcess) -> None:
    answer = ask(
        service,
        "POST",
        "/api/v1/internal/attempts/job_x-a1/events",
        json={"events": []},
        headers={"Authorization": f"Bearer {ALICE}"},
    )

    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")


def test_session_cookie_is_kept_from_scripts_from_other_sites_and_from_plain_http(service: ServiceProcess) -> None:
    answer = ask(service, "POST", "/login", data={"key": ALICE, "next": "/jobs/job_x"})

    attributes = {part.strip().lower() for part in answer.headers["set-cookie"].split(";")[1:]}
    assert attributes >= {"httponly", "secure", "samesite=lax", "path=/", "max-age=604800"}
    assert answer.headers["location"] == "/jobs/job_x"
    assert ALICE not in answer.headers["set-cookie"]


def test_wrong_key_gets_the_page_again_and_no_cookie(service: ServiceProcess) -> None:
    answer = ask(service, "POST", "/login", data={"key": "wrong", "next": '/"><script>'})

    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers
    assert "This is not an API key of this service" in answer.text
    assert "<script>" not in answer.text
    assert "script-src" not in answer.headers["content-security-policy"]
    assert "default-src 'none'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [(b"key=" + b"a" * 4093, 413, "body_too_large"), (b"key=a" + b"&a=1" * 8, 400, "malformed_body")],
)
def test_login_reads_a_short_form_and_no_more(service: ServiceProcess, body: bytes, status: int, code: str) -> None:
    answer = ask(service, "POST", "/login", content=body)

    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert ask(service, "POST", "/login", content=b"key=".ljust(4096, b"a")).status_code == 401


@pytest.mark.parametrize(
    "wanted",
    ["https://evil.example", "//evil.example", "/\\evil.example", "javascript:alert(1)", "/a\r\nSet-Cookie: x", ""],
)
def test_login_leads_nowhere_else(service: ServiceProcess, wanted: str) -> None:
    posted = ask(service, "POST", "/login", data={"key": ALICE, "next": wanted})
    shown = ask(service, "GET", "/login", params={"next": wanted}, headers=logged_in(service))

    assert [answer.headers["location"] for answer in (posted, shown)] == ["/", "/"]


def test_logout_takes_the_cookie_back(service: ServiceProcess) -> None:
    answer = ask(service, "POST", "/logout", headers=logged_in(service) | {"Origin": PUBLIC})

    assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    assert "max-age=0" in answer.headers["set-cookie"].lower()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": PUBLIC}, 404),
        ({"Origin": PUBLIC.upper()}, 404),
        ({"Host": "ngd-controller.ns.svc:8000", "Origin": "http://ngd-controller.ns.svc:8000"}, 404),
        ({"Host": "any.name.at.all"}, 404),
        ({"Origin": "http://ngd.example.com"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "https://ngd.example.com.evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "https://evil.example", "X-Forwarded-Host": "evil.example"}, 403),
    ],
)
def test_page_of_another_site_is_refused_even_with_a_session(
    service: ServiceProcess, headers: dict[str, str], status: int
) -> None:
    answer = ask(service, "POST", "/api/v1/jobs/job_none:cancel", headers=logged_in(service) | headers)

    assert answer.status_code == status


def test_change_of_the_keys_counts_within_seconds(service: ServiceProcess) -> None:
    carol = "carol-0123456789-0123456789"
    folder = service.home.parent / "keys"
    with Client(service.url, key=carol) as client:
        with pytest.raises(UnauthorizedError, match=r"none of this service's, or no longer; ask who runs it"):
            client.list_jobs()
        write_keys(folder, carol=carol)
        wait_until(lambda: ask(service, "POST", "/login", data={"key": carol}).status_code == 303, "carol is let in")
        client.list_jobs()
        (folder / "carol").unlink()
        wait_until(lambda: ask(service, "POST", "/login", data={"key": carol}).status_code == 401, "carol is kept out")


@pytest.mark.parametrize("key", ["", " ", "\u00e9" * 20, "a\nb"])
def test_key_that_no_header_carries_is_refused_by_the_client(key: str) -> None:
    with pytest.raises(InvalidKeyError, match="visible ASCII"):
        Client("http://127.0.0.1:1", key=key)


def ngd(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from ngd_service.cli.commands import main; main()", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"} | environment,
        timeout=60,
        check=False,
    )


def test_command_takes_address_and_key_from_options_or_the_environment(service: ServiceProcess) -> None:
    file = str(service.home.parent / "keys" / "alice")

    listed = [
        ngd("jobs", "--key-file", file, NGD_URL=service.url),
        ngd("jobs", "--url", service.url, NGD_API_KEY_FILE=file),
        ngd("jobs", NGD_URL=service.url, NGD_API_KEY=ALICE),
    ]

    assert [(result.returncode, result.stderr) for result in listed] == [(0, "")] * 3


@pytest.mark.parametrize(
    ("environment", "status", "words"),
    [
        ({}, 1, "this service wants an API key; send it as Authorization: Bearer <key>; with ngd, give --key-file or"),
        ({"NGD_API_KEY": "wrong"}, 1, "the API key is none of this service's, or no longer; ask who runs it for one"),
        ({"NGD_API_KEY_FILE": "/nowhere"}, 1, "can't read the API key in /nowhere: No such file or directory; check"),
        ({"NGD_API_KEY_FILE": "/nowhere", "NGD_API_KEY": "x"}, 2, "both set, and only one can count; unset the other"),
    ],
)
def test_command_without_a_good_key_says_what_to_do(
    service: ServiceProcess, environment: dict[str, str], status: int, words: str
) -> None:
    result = ngd("jobs", NGD_URL=service.url, **environment)

    assert result.returncode == status
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_service_without_a_good_key_does_not_start(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys", alice="short")

    with pytest.raises(AssertionError, match=r"alice must have 20 to 1024 characters, got 5"):
        ServiceProcess(tmp_path / "home", api_keys_dir=str(keys))
    assert os.listdir(tmp_path / "home") == ["serve.txt"]
