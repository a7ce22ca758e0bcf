"""What an open page of a long job costs the controller, in CPU seconds of this process, which stands for it."""

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from nicegui import Client as PageClient
from nicegui import ui

from ngd_service.api.application import api_application
from ngd_service.api.container import Container
from ngd_service.app import _assemble
from ngd_service.client.client import AsyncClient
from ngd_service.dashboard.job import POLL_S, JobPage
from ngd_service.dashboard.theme import page_frame
from ngd_service.settings import load_settings
from ngd_workers.contract.events import Steps
from tests.support.history import long_record, numbered, start_job, tell

NUM_STATISTICS = 160
FIRST_VIEW_S, INCREMENT_S, POLL_COST_S = 0.2, 0.005, 0.5 * POLL_S / 50  # half a core for 50 open pages


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Container]:
    parts = _assemble(load_settings(home=tmp_path))
    gc.freeze()  # as the server does
    yield parts
    gc.unfreeze()
    parts.store.close()


@asynccontextmanager
async def opened(
    app: FastAPI, job_id: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[JobPage, list[str]]]:
    """A page as its server side holds it, and what its browser is told to run."""
    told: list[str] = []
    async with AsyncClient("http://127.0.0.1", transport=httpx.ASGITransport(app)) as api:
        with PageClient(ui.page("/test"), request=None) as client:
            monkeypatch.setattr(client, "run_javascript", lambda code, **_: told.append(code))
            monkeypatch.setattr(PageClient, "has_socket_connection", True)
            with page_frame("Job") as freshness:
                page = JobPage(api, job_id, freshness)
            page.timer = ui.timer(3600, lambda: None, active=False)
            yield page, told
        client.delete()


async def costs(parts: Container, num_steps: int, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float, float]:
    """Returns the CPU seconds of a first view, of a call for the newest steps, and of a poll that finds a new step.

    The best of some: other processes take the caches of a busy machine away.
    """
    claim = start_job(parts.store)
    seq = tell(parts.store, f"{claim.job.id}-a1", num_steps, NUM_STATISTICS, evaluate_every=max(1, num_steps // 1000))
    first, increments, polls = [], [], []
    app = api_application(None, parts)
    for _ in range(3):
        async with opened(app, claim.job.id, monkeypatch) as (page, told):
            first.append(await cpu_s(page.refresh()))
            for step in range(num_steps + 1, num_steps + 11):
                parts.store.ingest(
                    f"{claim.job.id}-a1", [numbered(seq, Steps(records=[long_record(step, NUM_STATISTICS)]))]
                )
                seq += 1
                increments.append(await cpu_s(page.api.metrics(claim.job.id, from_step=step - 1)))
                polls.append(await cpu_s(page.refresh()))
            num_steps += 10
            assert f"[{num_steps}," in "".join(told[-3:]), "the page did not follow"
    return min(first), sorted(increments)[5], sorted(polls)[5]


async def cpu_s(call: Awaitable[object]) -> float:
    before = time.process_time()
    await call
    return time.process_time() - before


def test_page_does_not_cost_more_the_longer_a_job_has_run(parts: Container, monkeypatch: pytest.MonkeyPatch) -> None:
    _, short_increment, short_poll = asyncio.run(costs(parts, 300, monkeypatch))
    _, increment, poll = asyncio.run(costs(parts, 3_000, monkeypatch))
    assert increment < 1.5 * short_increment
    assert poll < 1.5 * short_poll


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_page_of_a_job_of_a_million_steps_is_cheap(parts: Container, monkeypatch: pytest.MonkeyPatch) -> None:
    first, increment, poll = asyncio.run(costs(parts, 1_000_000, monkeypatch))
    assert first < FIRST_VIEW_S
    assert increment < INCREMENT_S
    assert poll < POLL_COST_S
