"""A headless Chromium that may ask nothing of another address."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVES_A_BROWSER = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium to drive: apt-get install chromium"),
]
SIZE: ViewportSize = {"width": 1280, "height": 900}
ARGUMENTS = [
    "--no-sandbox",  # tests may run as root, whom Chromium's sandbox refuses
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def browser_process() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def browser_page(browser: Browser, complaints: list[str]) -> Iterator[Page]:
    """Yields a page that shares nothing with others; complaints: what it asks of others, and says against itself."""
    with browser.new_context(viewport=SIZE, locale="en-GB", timezone_id="Asia/Tokyo") as context:
        page = context.new_page()
        page.on("request", lambda request: None if _is_local(request.url) else complaints.append(request.url))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        yield page


def _is_local(url: str) -> bool:
    parts = urlsplit(url)
    return parts.hostname == "127.0.0.1" or parts.scheme in ("data", "blob")
