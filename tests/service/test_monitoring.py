"""What Prometheus and Kubernetes' probes are told, also while something hangs."""

import asyncio
import re
import subprocess
import threading
from collections.abc import Callable
from datetime import UTC, datetime

import httpx
import pytest
from fastapi import FastAPI

from ngd_service.api.container import Container
from ngd_service.client.client import Client
from ngd_service.errors import StoreUnavailableError
from ngd_service.monitoring.metrics import ControllerMetrics
from ngd_service.monitoring.probe import Probe
from ngd_service.store.base import JobCounts
from tests.support.attempts import fault_spec as spec
from tests.support.attempts import small_spec
from tests.support.chart import PROMTOOL, tool
from tests.support.deadline import wait_until
from tests.support.service_process import ServiceProcess

FAMILIES = {
    "ngd_jobs": "gauge",
    "ngd_oldest_queued_seconds": "gauge",
    "ngd_reconciler_tick_age_seconds": "gauge",
    "ngd_reconciler_tick_seconds": "histogram",
    "ngd_dispatcher_up": "gauge",
    "ngd_attempts_started_total": "counter",
    "ngd_attempts_ended_total": "counter",
    "ngd_events_ingested_total": "counter",
    "ngd_http_requests_total": "counter",
    "ngd_http_request_seconds": "histogram",
    "ngd_running_job_idle_seconds": "gauge",
    "ngd_longest_in_phase_seconds": "gauge",
    "ngd_build_info": "gauge",
}
Scrape = Callable[[], dict[str, float]]


def samples(text: str) -> dict[str, float]:
    """Each sample's name with its labels, and its value."""
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


@pytest.fixture
def scrape(shared_service: ServiceProcess) -> Scrape:
    return lambda: samples(httpx.get(f"{shared_service.url}/metrics").text)


def test_metrics_are_those_that_rules_and_dashboards_name(shared_service: ServiceProcess, client: Client) -> None:
    client.wait(client.submit(spec()).id, timeout_s=60)

    answer = httpx.get(f"{shared_service.url}/metrics")

    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert dict(re.findall(r"^# TYPE (\S+) (\S+)$", answer.text, re.M)) == FAMILIES
    assert set(re.findall(r"^# HELP (\S+) \S", answer.text, re.M)) == set(FAMILIES)


def test_promtool_has_nothing_to_say_against_the_metrics(shared_service: ServiceProcess) -> None:
    promtool = tool(PROMTOOL, "promtool")
    text = httpx.get(f"{shared_service.url}/metrics").content

    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, timeout=30, check=False)

    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


@pytest.mark.slow
def test_metrics_follow_the_life_of_jobs(start_service: Callable[..., ServiceProcess]) -> None:
    service = start_service(max_running_jobs=2)
    client = service.client

    def scrape() -> dict[str, float]:
        return samples(httpx.get(f"{service.url}/metrics").text)

    before = scrape()
    ended = client.wait(client.submit(spec()).id, timeout_s=60)
    client.wait(client.submit(spec("refuses")).id, timeout_s=60)
    running = client.submit(spec("waits"))
    idle = f'ngd_running_job_idle_seconds{{job_id="{running.id}"}}'
    wait_until(lambda: idle in scrape(), "the running job is watched", timeout_s=60)
    idle_s = scrape()[idle]
    wait_until(lambda: scrape()[idle] > idle_s, "its workers have nothing to say")
    client.cancel(running.id)
    client.wait(running.id, timeout_s=60)

    assert ended.status.phase == "SUCCEEDED"
    after = scrape()
    assert after["ngd_attempts_started_total"] == 3
    for result in ("succeeded", "failed", "cancelled"):
        assert after[f'ngd_attempts_ended_total{{result="{result}"}}'] == 1
    jobs = client.list_jobs().jobs
    told = [event for job in jobs for event in client.events(job.id, limit=1000).events if event.seq is not None]
    assert after["ngd_events_ingested_total"] == len(told)
    wait_until(lambda: scrape()['ngd_jobs{phase="CANCELLED"}'] == 1, "the jobs are counted again")
    now = scrape()
    assert idle not in now
    assert {name: value for name, value in now.items() if name.startswith("ngd_jobs{") and value} == {
        f'ngd_jobs{{phase="{phase}"}}': 1 for phase in ("SUCCEEDED", "FAILED", "CANCELLED")
    }
    assert now["ngd_oldest_queued_seconds"] == 0
    assert now["ngd_reconciler_tick_seconds_count"] > before["ngd_reconciler_tick_seconds_count"]
    assert now["ngd_reconciler_tick_age_seconds"] < 30


def test_attempt_without_a_word_is_counted_as_lost(start_service: Callable[..., ServiceProcess]) -> None:
    service = start_service()
    posted = small_spec(name="dies", schedule={"steps": 20}, failure={"max_attempts": 2}).model_dump(mode="json")

    service.client.wait(service.client.submit(posted).id, timeout_s=60)

    counted = samples(httpx.get(f"{service.url}/metrics").text)
    assert {name: value for name, value in counted.items() if "attempts_ended" in name} == {
        f'ngd_attempts_ended_total{{result="{result}"}}': 2 if result == "lost" else 0
        for result in ("succeeded", "failed", "cancelled", "lost")
    }


def test_requests_are_counted_by_route_and_never_by_path(
    shared_service: ServiceProcess, client: Client, scrape: Scrape
) -> None:
    job = client.submit(spec())
    client.wait(job.id, timeout_s=60)
    before = scrape()
    get = 'ngd_http_requests_total{method="GET",route="/api/v1/jobs/{job_id}",status="%s"}'
    seconds = 'ngd_http_request_seconds_count{route="/api/v1/jobs/{job_id}"}'

    client.get(job.id)
    client.wait(job.id, timeout_s=5)
    for method, path in (("GET", "/api/v1/jobs/job_none"), ("GET", "/wp-admin.php"), ("PROPFIND", "/api/v1/jobs")):
        httpx.request(method, shared_service.url + path)
    after = scrape()

    assert after[get % 200] - before[get % 200] == 2
    assert after[get % 404] - before.get(get % 404, 0) == 1
    assert after[seconds] - before.get(seconds, 0) == 2  # the call that waits is left out
    routes = {match for name in after for match in re.findall(r'route="([^"]*)"', name)}
    assert not [route for route in routes if "job_" in route and "{job_id}" not in route]
    assert "wp-admin" not in str(routes)
    methods = {match for name in after for match in re.findall(r'method="([^"]*)"', name)}
    assert "other" in methods
    assert "PROPFIND" not in methods


def test_worker_whose_clock_is_ahead_is_not_idle_for_less_than_no_time() -> None:
    ahead = JobCounts({}, None, {"job_1": datetime(2999, 1, 1, tzinfo=UTC)}, {})

    shown = samples(ControllerMetrics("1").exposition(ahead).decode())

    assert shown['ngd_running_job_idle_seconds{job_id="job_1"}'] == 0


def test_backend_that_does_not_answer_is_down() -> None:
    metrics = ControllerMetrics("1")
    seen = [samples(metrics.exposition(None).decode())["ngd_dispatcher_up"]]

    for call, is_up in (("submit", False), ("inspect", True), ("submit", True)):
        metrics.dispatcher_answered(call, is_up=is_up)
        seen.append(samples(metrics.exposition(None).decode())["ngd_dispatcher_up"])

    assert seen == [1, 0, 0, 1]  # a look that is answered says nothing of submissions


def parts(app: FastAPI) -> Container:
    found: Container = app.state.container
    return found


def test_probes_answer_while_every_thread_waits_for_the_database(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a PostgreSQL hangs: ten times as many calls as there are threads wait for it."""
    answers, waiting = threading.Event(), threading.Semaphore(0)

    def hang(*_: object, **__: object) -> None:
        waiting.release()
        answers.wait(60)
        raise StoreUnavailableError("the database does not answer: at last")

    monkeypatch.setattr(type(parts(app).jobs), "list", hang)
    for probe in (parts(app).database, parts(app).job_counts):
        monkeypatch.setattr(probe, "_ask", hang)

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            stuck = [asyncio.create_task(client.get("/api/v1/jobs")) for _ in range(400)]
            while not waiting.acquire(blocking=False):
                await asyncio.sleep(0)
            asked = asyncio.gather(*(client.get(path) for path in ("/healthz", "/readyz", "/readyz", "/metrics")))
            answered = await asyncio.wait_for(asked, 20)
            answers.set()
            await asyncio.gather(*stuck)
            return answered

    healthy, *ready, metrics = asyncio.run(ask())

    assert [answer.status_code for answer in (healthy, *ready, metrics)] == [200, 503, 503, 200]
    assert re.fullmatch(r"the database has not answered for \d+ s", ready[0].json()["checks"]["database"])
    assert "ngd_jobs" not in metrics.text
    assert "ngd_reconciler_tick_age_seconds" in metrics.text


def test_question_is_asked_once_for_all_who_wait_and_again_when_its_answer_is_old() -> None:
    asked, may_answer = list[int](), threading.Event()

    def question() -> int:
        asked.append(len(asked))
        may_answer.wait(30)
        return len(asked)

    async def ask() -> list[int]:
        probe = Probe(question, fresh_s=60.0)
        with pytest.raises(TimeoutError):
            await probe.answer(within_s=0.01)
        assert probe.waited_s > 0
        together = asyncio.gather(*(probe.answer(within_s=30) for _ in range(20)))
        may_answer.set()
        first = await together
        assert probe.waited_s == 0
        assert await probe.answer(within_s=30) == 1
        probe._asked_at -= 61
        return [*first, await probe.answer(within_s=30)]

    assert asyncio.run(ask()) == [1] * 20 + [2]
