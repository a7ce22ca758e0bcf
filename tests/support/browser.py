"""A headless Chromium that may ask nothing of another address."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVES_A_BROWSER = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium to drive: apt-get install chromium"),
]
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
def browser_page(complaints: list[str]) -> Iterator[Page]:
    """Yields a page; complaints: what it asks of others, and what it has to say against itself."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1280, "height": 900}, locale="en-GB", timezone_id="Asia/Tokyo")
        page.on("request", lambda request: None if _is_local(request.url) else complaints.append(request.url))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        yield page
        browser.close()


def _is_local(url: str) -> bool:
    parts = urlsplit(url)
    return parts.hostname == "127.0.0.1" or parts.scheme in ("data", "blob")
