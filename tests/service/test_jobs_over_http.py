"""A job's life as a client sees it: order, cancel, progress, streams, logs."""

import re
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise

import httpx
import psutil
import pytest
from httpx_sse import EventSource

from ngd_service.client.client import Client, InvalidRequestError, NotFoundError
from ngd_service.dashboard.activity import words
from ngd_service.dashboard.summary import progress_words
from ngd_service.resources import Job
from tests.support.attempts import fault_spec as spec
from tests.support.deadline import wait_until
from tests.support.service_process import ServiceProcess


def wait_for_phase(client: Client, job: Job, phase: str) -> None:
    wait_until(lambda: client.get(job.id).status.phase == phase, f"{job.id} is {phase}")


def test_job_succeeds_and_shows_what_it_did(client: Client) -> None:
    job = client.submit(spec())
    assert re.fullmatch(r"job_[0-9A-Z]{26}", job.id)

    ended = client.wait(job.id, timeout_s=60)

    assert ended.status.phase == "SUCCEEDED"
    assert ended.status.progress.model_dump() == {
        "step": 20, "total_steps": 20, "epoch": 2.0, "eta_s": None, "lost_steps": [], "skipped_samples": 0,
        "target_step": None, "target_s": None, "data_share": pytest.approx(1 / 11),  # 1 ms of 11 in each step
    }  # fmt: skip
    assert ended.status.result is not None
    assert ended.status.result.metrics["accuracy"] == pytest.approx(0.9)
    assert ended.metrics_latest["loss"] == pytest.approx(1 / 20)
    assert ended.created_at.tzinfo is UTC or ended.created_at.utcoffset() == datetime.now(UTC).utcoffset()


def test_job_whose_curve_has_a_hole_says_so_for_good(client: Client) -> None:
    posted = client.submit(spec("forgets", steps=20))

    ended = client.wait(posted.id, timeout_s=60)

    assert ended.status.phase == "SUCCEEDED"
    assert [lost.model_dump() for lost in ended.status.progress.lost_steps] == [{"first_step": 6, "last_step": 9}]
    told = [event for event in client.events(posted.id).events if event.kind == "steps_lost"]
    assert [words(event) for event in told] == [
        "Steps 6 to 9 are lost: they were done, and no record of them has arrived"
    ]
    assert re.fullmatch(r"steps, 100%(, epoch \d+)?; no record of 6 to 9", progress_words(ended))


def test_jobs_over_the_limit_wait_in_order(start_service: Callable[..., ServiceProcess]) -> None:
    client = start_service(max_running_jobs=1).client
    posted = [client.submit(spec(steps=15)) for _ in range(3)]

    ended = [client.wait(job.id, timeout_s=60) for job in posted]

    for earlier, later in pairwise(ended):
        assert earlier.finished_at is not None
        assert later.started_at is not None
        assert earlier.finished_at <= later.started_at


def test_waiting_jobs_say_their_place_and_what_they_wait_for(start_service: Callable[..., ServiceProcess]) -> None:
    client = start_service(max_running_jobs=1, cancel_grace_s=0).client
    running = client.submit(spec("waits"))
    wait_for_phase(client, running, "RUNNING")
    waiting = [client.submit(spec("waits")) for _ in range(3)]
    why = "it waits for a running job to end (1 run, NGD_MAX_RUNNING_JOBS is 1)"

    assert waiting[-1].status.message == f"number 3 of 3 in the queue: {why}"
    assert [job.status.message for job in client.list_jobs(phase="queued").jobs] == [
        f"number {place} of 3 in the queue: {why}" for place in (3, 2, 1)
    ]
    watched = client.watch(waiting[-1].id)
    assert next(watched).status.message == f"number 3 of 3 in the queue: {why}"
    client.cancel(waiting[0].id)
    assert next(watched).status.message == f"number 2 of 2 in the queue: {why}"
    watched.close()  # type: ignore[attr-defined]
    for job in (*waiting, running):
        client.cancel(job.id)


def test_job_that_does_not_start_in_its_time_fails(start_service: Callable[..., ServiceProcess]) -> None:
    sleeper = ("sh", "-c", "exec sleep 600")
    client = start_service(driver_command=sleeper, start_within_s=0.5).client

    ended = client.wait(client.submit(spec()).id, timeout_s=60)

    assert (ended.status.phase, ended.status.reason) == ("FAILED", "StartTimeout")
    assert "did not report within 0.5 s; the last that it waited for: waiting for the" in str(ended.status.message)


def test_cancelled_job_stops_by_itself(client: Client) -> None:
    job = client.submit(spec(steps=10_000))
    wait_for_phase(client, job, "RUNNING")

    client.cancel(job.id)

    ended = client.wait(job.id, timeout_s=20)
    assert (ended.status.phase, ended.status.reason) == ("CANCELLED", "UserCancelled")
    assert client.cancel(job.id).status == ended.status


@pytest.mark.parametrize("name", ["waits", "deaf"])
def test_job_that_does_not_listen_is_interrupted_and_then_killed(
    start_service: Callable[..., ServiceProcess], name: str
) -> None:
    client = start_service(cancel_grace_s=0.2, interrupt_grace_s=0.2).client
    job = client.submit(spec(name))
    wait_for_phase(client, job, "RUNNING")

    client.cancel(job.id)

    assert client.wait(job.id, timeout_s=30).status.phase == "CANCELLED"
    left = [
        process for process in psutil.process_iter(["cmdline"]) if job.id in " ".join(process.info["cmdline"] or [])
    ]
    assert left == []


def test_cancelled_waiting_job_never_starts(start_service: Callable[..., ServiceProcess]) -> None:
    client = start_service(max_running_jobs=1).client
    client.submit(spec(steps=10_000))
    waiting = client.submit(spec())

    client.cancel(waiting.id)

    ended = client.wait(waiting.id, timeout_s=20)
    assert (ended.status.phase, ended.status.attempt) == ("CANCELLED", 0)


def test_failure_that_would_repeat_ends_the_job_with_its_own_words(client: Client) -> None:
    ended = client.wait(client.submit(spec("refuses")).id, timeout_s=60)

    assert (ended.status.phase, ended.status.reason, ended.status.attempt) == ("FAILED", "DataNotFound", 1)
    assert ended.status.message == "no folder '[/x]'; set NGD_DATA_DIR"


def test_same_idempotency_key_gives_the_same_job(client: Client) -> None:
    job = client.submit(spec(), idempotency_key="key-1")

    again = client._http.post("/api/v1/jobs", json=spec(), headers={"Idempotency-Key": "key-1"})

    assert again.status_code == 201
    assert again.headers["Idempotency-Replayed"] == "true"
    assert again.json()["id"] == job.id


def test_stream_brings_every_event_once_and_ends_with_the_job(client: Client) -> None:
    job = client.submit(spec())

    events = list(client.follow(job.id))

    assert events == client.events(job.id, limit=1000).events
    assert events[-1].data["to"] == "SUCCEEDED"
    assert [event.id for event in events] == sorted({event.id for event in events})


def test_stream_goes_on_after_last_event_id(client: Client) -> None:
    job = client.submit(spec())
    client.wait(job.id, timeout_s=60)
    events = client.events(job.id, limit=1000).events

    headers = {"Last-Event-ID": str(events[2].id)}
    with client._http.stream("GET", f"/api/v1/jobs/{job.id}/events/stream", headers=headers) as response:
        shown = list(EventSource(response).iter_sse())

    assert [int(frame.id) for frame in shown if frame.event not in ("job", "end")] == [event.id for event in events[3:]]
    assert shown[-1].event == "end"
    assert response.headers["cache-control"] == "no-store"


def test_watch_shows_progress_until_the_end(client: Client) -> None:
    job = client.submit(spec(steps=150))

    seen = list(client.watch(job.id))

    assert [item.resource_version for item in seen] == sorted(item.resource_version for item in seen)
    assert seen[-1].status.phase == "SUCCEEDED"
    assert any(0 < item.status.progress.step < 150 for item in seen)


def test_logs_are_read_and_followed(client: Client) -> None:
    job = client.submit(spec())
    followed = "".join(chunk.text for chunk in client.follow_logs(job.id))

    assert "attempt 1 of steps\n" in followed
    assert client.logs(job.id) == followed
    assert client.logs(job.id, tail=1) == followed.splitlines(keepends=True)[-1]
    with pytest.raises(NotFoundError, match="no attempt 7"):
        client.logs(job.id, attempt=7)


def test_pages_of_jobs_follow_each_other(client: Client) -> None:
    posted = [client.submit(spec()).id for _ in range(3)]
    page = client.list_jobs(page_size=2)

    rest = client.list_jobs(page_size=2, page_token=page.next_page_token)

    assert [job.id for job in (*page.jobs, *rest.jobs)][:3] == posted[::-1]


def test_metrics_are_columns_with_the_last_point(client: Client) -> None:
    job = client.submit(spec(steps=50))
    client.wait(job.id, timeout_s=60)

    metrics = client.metrics(job.id, names=["loss", "seconds", "test_accuracy"], max_points=10)

    assert set(metrics.series) == {"loss", "seconds.forward_backward", "seconds.data", "test_accuracy"}
    assert metrics.series["loss"].steps[-1] == metrics.last_step == 50
    assert len(metrics.series["loss"].steps) <= 10
    assert client.metrics(job.id, from_step=51).series == {}
    part = client.metrics(job.id, names=["loss"], from_step=11, to_step=20)
    assert (part.series["loss"].steps, part.last_step) == (list(range(11, 21)), 20)


def test_statistics_are_a_matrix_of_ages(client: Client) -> None:
    job = client.submit(spec(steps=20))
    client.wait(job.id, timeout_s=60)

    matrix = client.statistics(job.id, max_points=10)

    assert matrix.names == ["layer.A", "layer.G"]
    assert matrix.steps == list(range(2, 21, 2))
    assert matrix.ages[0] == [1, 3] * 5
    assert sum(matrix.refreshes[0]) == 5
    assert matrix.intervals[1] == [2] * 10
    later = client.statistics(job.id, from_step=13, span=4)
    assert (later.span, later.steps, later.refreshes[0]) == (4, [16, 20], [1, 1])
    part = client.statistics(job.id, from_step=5, to_step=8)
    assert (part.steps, part.last_step) == ([5, 6, 7, 8], 8)


def test_events_of_some_kinds_are_paged_from_the_first(client: Client) -> None:
    job = client.submit(spec(steps=20))
    client.wait(job.id, timeout_s=60)
    everything = client.events(job.id, limit=1000).events
    kinds, found, after = ["phase", "started"], [], 0

    while page := client.events(job.id, after=after, limit=2, first_of=kinds).events:
        assert len(page) <= 2
        found += page
        after = page[-1].id

    assert found == [event for event in everything if event.kind in kinds]
    with pytest.raises(InvalidRequestError, match="first_of and newest_of"):
        client.events(job.id, first_of=kinds, newest_of=kinds)


def test_newest_events_of_some_kinds_are_listed(client: Client) -> None:
    job = client.submit(spec(steps=20))
    client.wait(job.id, timeout_s=60)
    everything = client.events(job.id, limit=1000).events

    newest = client.events(job.id, limit=2, newest_of=["phase", "started"])

    assert newest.events == [event for event in everything if event.kind in ("phase", "started")][-2:]
    assert client.events(job.id, after=newest.next_after, newest_of=["phase"]).events == []


def test_health_and_readiness(client: Client, shared_service: ServiceProcess) -> None:
    assert httpx.get(f"{shared_service.url}/healthz").json()["status"] == "ok"
    assert client.ready().checks == {"database": "ok", "reconciler": "ok"}


def test_internal_route_takes_the_attempts_own_token_alone(client: Client, shared_service: ServiceProcess) -> None:
    job = client.submit(spec("waits"))
    other = client.submit(spec("waits"))
    wait_for_phase(client, job, "RUNNING")
    wait_for_phase(client, other, "RUNNING")
    facts = shared_service.home / "runs" / other.id / "attempts" / "1" / "attempt.json"
    foreign = httpx.Response(200, content=facts.read_bytes()).json()["token"]
    url = f"{shared_service.url}/api/v1/internal/attempts/{job.id}-a1/events"

    bare = httpx.post(url, json={"events": []})
    wrong = httpx.post(url, json={"events": []}, headers={"Authorization": f"Bearer {foreign}"})

    assert (bare.status_code, wrong.status_code) == (401, 401)
    assert wrong.json()["code"] == "unauthorized"
    assert facts.stat().st_mode & 0o777 == 0o600
    for running in (job, other):
        client.cancel(running.id)


def test_reports_after_the_end_are_refused(client: Client, shared_service: ServiceProcess) -> None:
    job = client.submit(spec())
    client.wait(job.id, timeout_s=60)
    facts = shared_service.home / "runs" / job.id / "attempts" / "1" / "attempt.json"
    token = httpx.Response(200, content=facts.read_bytes()).json()["token"]

    url = f"{shared_service.url}/api/v1/internal/attempts/{job.id}-a1/events"
    answer = httpx.post(url, json={"events": []}, headers={"Authorization": f"Bearer {token}"})

    assert (answer.status_code, answer.json()["code"]) == (409, "stale_attempt")
