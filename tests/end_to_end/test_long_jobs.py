"""Jobs of a million steps, and many readers of one job: what they take of the controller and of the socket."""

import asyncio
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.parse import urlencode
from uuid import uuid4

import httpx
import psutil
import pytest
import socketio
from playwright.sync_api import Page

from tests.support.browser import DRIVES_A_BROWSER
from tests.support.page_worker import DRAW_MS, Worker, open_job, see_step
from tests.support.service_process import ServiceProcess

pytestmark = [*DRIVES_A_BROWSER, pytest.mark.slow, pytest.mark.timeout(3600)]
logger = logging.getLogger(__name__)  # pytest -m slow --log-cli-level INFO shows the figures

MILLION, NUM_STATISTICS = 1_000_000, 12
FIRST_VIEW_BYTES, FIRST_VIEW_CPU_S = 1_500_000, 1.5
NUM_READERS, NUM_STEPS = 50, 20
STEP_OF_A_READER_CPU_S = 0.02  # a page asks once a second: 50 of them then take one core at most
POINTS = """() => {
  const panel = [...document.querySelectorAll('.panel')].find(p => p.querySelector('h2')?.innerText === 'Loss');
  const chart = panel && panel.querySelector('.nicegui-echart');
  return (chart && getElement(chart.id.slice(1)).chart?.getOption().series?.[0]?.data?.length) ?? 0;
}"""
FIRST_PAINT = "() => performance.getEntriesByName('first-contentful-paint')[0].startTime / 1000"


@contextmanager
def cpu_of(service: ServiceProcess) -> Iterator[Callable[[], float]]:
    """Yields what tells the CPU seconds of the controller since here."""
    process = psutil.Process(service.process.pid)

    def now() -> float:
        return float(sum(process.cpu_times()[:2]))

    first = now()
    yield lambda: now() - first


def test_first_view_of_a_million_steps_is_as_small_as_that_of_a_thousand(
    service: ServiceProcess, worker_of: Callable[[], Worker], page: Page
) -> None:
    worker = worker_of()
    worker.has_done(MILLION, NUM_STATISTICS)

    with cpu_of(service) as cpu_s:
        opened = time.monotonic()
        frames = open_job(page, service, worker)
        painted = page.evaluate(FIRST_PAINT)
        see_step(page, MILLION)
        page.wait_for_function(f"({POINTS})() > 100", timeout=DRAW_MS)
        drawn, used = time.monotonic() - opened, cpu_s()

    logger.info(
        "first paint %.2f s, curves after %.2f s, %d bytes on the socket, %.2f CPU s of the controller",
        painted, drawn, frames.num_bytes, used,
    )  # fmt: skip
    assert frames.num_bytes < FIRST_VIEW_BYTES
    assert used < FIRST_VIEW_CPU_S


class Reader:
    """What a browser's tab is to the controller: it fetches the page, and listens on its socket."""

    def __init__(self) -> None:
        self._socket = socketio.AsyncClient()
        self.texts: list[str] = []
        self._socket.on("*", lambda name, *data: self.texts.append(json.dumps([name, *data], default=str)))

    async def open(self, http: httpx.AsyncClient, url: str, path: str) -> None:
        page = (await http.get(url + path)).raise_for_status().text
        (client_id,) = re.findall(r"'client_id': '([^']+)'", page)
        own = {"client_id": client_id, "document_id": str(uuid4()), "tab_id": str(uuid4())}
        own |= {"next_message_id": "0", "implicit_handshake": "true"}
        await self._socket.connect(
            f"{url}?{urlencode(own)}", socketio_path="/_nicegui_ws/socket.io", transports=["websocket"]
        )

    def has_seen(self, words: str) -> bool:
        return any(words in text for text in self.texts)

    async def close(self) -> None:
        await self._socket.disconnect()


def test_fifty_readers_of_a_job_leave_the_controller_idle_most_of_the_time(
    service: ServiceProcess, worker_of: Callable[[], Worker]
) -> None:
    worker = worker_of()
    worker.has_done(1000, NUM_STATISTICS)

    async def seen_by(readers: list[Reader], step: int) -> None:
        until = time.monotonic() + DRAW_MS / 1000
        while not all(reader.has_seen(f"{step:,} / 2,000,000") for reader in readers):
            assert time.monotonic() < until, f"{sum(r.has_seen(f'{step:,} /') for r in readers)} readers saw {step}"
            await asyncio.sleep(0.5)

    async def read() -> float:
        readers = [Reader() for _ in range(NUM_READERS)]
        async with httpx.AsyncClient() as http:
            for reader in readers:
                await reader.open(http, service.url, f"/jobs/{worker.job.id}")
        await seen_by(readers, 1000)
        with cpu_of(service) as cpu_s:
            for step in range(1001, 1001 + NUM_STEPS):
                worker.does(step, NUM_STATISTICS)
                await asyncio.sleep(1)
            await seen_by(readers, 1000 + NUM_STEPS)
            used = cpu_s()
        for reader in readers:
            await reader.close()
        return used

    with ThreadPoolExecutor(1) as other_thread:  # the browser of the file's other tests has a loop in this one
        used = other_thread.submit(asyncio.run, read()).result() / NUM_READERS / NUM_STEPS

    logger.info("%.4f CPU s of the controller for each step and reader", used)
    assert used < STEP_OF_A_READER_CPU_S
