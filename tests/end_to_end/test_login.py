"""A browser on a service with API keys: logging in, being thrown out, and the end of the service under open pages."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect, sync_playwright

from ngd_service.auth.access import SESSION_COOKIE
from ngd_service.client.client import Client
from tests.support.attempts import small_spec
from tests.support.browser import CHROMIUM, DRIVES_A_BROWSER
from tests.support.keys import ALICE, BOB, write_keys
from tests.support.service_process import ServiceProcess

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
SPEC = small_spec(name="waits", schedule={"steps": 20}).model_dump(mode="json")
PAGE_MS = 60_000  # two cores that others use too
STOP_S = 10.0

pytestmark = DRIVES_A_BROWSER


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceProcess]:
    keys = write_keys(tmp_path / "keys", alice=ALICE, bob=BOB)
    service = ServiceProcess(tmp_path / "home", key=ALICE, api_keys_dir=str(keys))
    yield service
    service.close()


@pytest.fixture
def browser() -> Iterator[BrowserContext]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        context = browser.new_context()
        context.set_default_timeout(PAGE_MS)
        yield context
        browser.close()


def log_in(page: Page, key: str) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Log in").click()


@pytest.mark.slow
def test_reader_logs_in_reads_acts_and_is_thrown_out_with_the_key(
    service: ServiceProcess, browser: BrowserContext
) -> None:
    expect.set_options(timeout=PAGE_MS)
    job = service.client.submit(SPEC)
    complaints: list[str] = []
    page = browser.new_page()
    page.on("pageerror", lambda error: complaints.append(str(error)))

    page.goto(f"{service.url}/jobs/{job.id}")
    assert page.url == f"{service.url}/login?next=%2Fjobs%2F{job.id}"
    log_in(page, "not-a-key-0123456789-0123456789")
    expect(page.get_by_role("alert")).to_contain_text("not an API key of this service")
    log_in(page, BOB)

    expect(page.get_by_role("heading", name="waits")).to_be_visible()
    assert page.url == f"{service.url}/jobs/{job.id}"
    expect(page.get_by_text("by alice")).to_be_visible()
    (cookie,) = browser.cookies()
    assert (cookie["name"], cookie["httpOnly"], cookie["sameSite"]) == (SESSION_COOKIE, True, "Lax")
    page.get_by_role("button", name="Cancel job").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel job").click()
    expect(page.locator(".phase.large", has_text="Cancelled")).to_be_visible()
    assert service.client.get(job.id).status.phase == "CANCELLED"

    page.goto(service.url)
    expect(page.get_by_role("link", name="waits")).to_be_visible()
    (service.home.parent / "keys" / "bob").unlink()
    expect(page.get_by_label("API key")).to_be_visible()  # the page itself notices
    log_in(page, ALICE)
    expect(page.get_by_role("link", name="waits")).to_be_visible()
    page.get_by_role("button", name="Log out alice").click()
    expect(page.get_by_label("API key")).to_be_visible()
    assert browser.cookies() == []
    assert complaints == []


@pytest.mark.slow
def test_service_ends_soon_under_open_pages_and_streams(service: ServiceProcess, browser: BrowserContext) -> None:
    expect.set_options(timeout=PAGE_MS)
    job = service.client.submit(SPEC)
    page = browser.new_page()
    page.goto(f"{service.url}/jobs/{job.id}")
    log_in(page, ALICE)
    expect(page.locator(".phase.large", has_text="Running")).to_be_visible()
    with Client(service.url, key=ALICE, patience_s=0) as follower:
        seen = threading.Event()
        following = threading.Thread(target=_follow, args=[follower, job.id, seen])
        following.start()
        assert seen.wait(30)

        began = time.monotonic()
        service.process.terminate()
        service.process.wait(timeout=60)
        took_s = time.monotonic() - began
        following.join()

    assert (service.process.returncode, took_s < STOP_S) == (0, True), f"{took_s:.1f} s"
    assert "Traceback" not in (service.home / "serve.txt").read_text()
    expect(page.get_by_text("Connection lost")).to_be_visible()
    ServiceProcess(service.home, key=ALICE, api_keys_dir=str(service.home.parent / "keys")).close()  # ends the job


def _follow(client: Client, job_id: str, seen: threading.Event) -> None:
    try:
        for _ in client.follow(job_id):
            seen.set()
    except ConnectionError:
        pass  # the service has gone
