"""The controller is killed for real, at the worst places. Jobs go on; nothing is lost and nothing happens twice."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest

from ngd_service.client.client import Client
from ngd_service.resources import Event, Job
from ngd_workers.contract.rundir import AttemptDir
from tests.support.attempts import fault_spec
from tests.support.deadline import wait_until
from tests.support.service_process import ServiceProcess

Start = Callable[..., ServiceProcess]
STEPS = 150  # three seconds of the fault driver
spec = partial(fault_spec, steps=STEPS)


def all_events(client: Client, job_id: str) -> list[Event]:
    events, after = list[Event](), 0
    while page := client.events(job_id, after=after, limit=50).events:
        events += page
        after = page[-1].id
    return events


def assert_nothing_lost_or_doubled(service: ServiceProcess, job: Job, attempt: int = 1) -> None:
    spool = AttemptDir.of(service.home / "runs" / job.id, attempt).spool
    events = all_events(service.client, job.id)
    reported = [event.seq for event in events if event.attempt == attempt and event.seq is not None]
    assert reported == list(range(1, len(spool.read_bytes().splitlines()) + 1))
    loss = service.client.metrics(job.id, names=["loss"], max_points=10_000).series["loss"]
    assert loss.steps == list(range(1, job.status.progress.step + 1))
    ends = [event for event in events if event.kind == "phase" and event.data["to"] == job.status.phase]
    assert len(ends) == 1


def drivers(service: ServiceProcess, job_id: str) -> list[psutil.Process]:
    folder = str(service.home / "runs" / job_id)
    found = psutil.process_iter(["cmdline", "status"])
    living = [process for process in found if process.info["status"] != psutil.STATUS_ZOMBIE]
    return [process for process in living if (process.info["cmdline"] or [""])[-1].startswith(folder)]


def wait_for_step(client: Client, job_id: str, step: int, timeout_s: float = 40) -> None:
    wait_until(lambda: client.get(job_id).status.progress.step >= step, f"step {step}", timeout_s=timeout_s)


def test_job_goes_on_while_the_controller_is_dead_and_is_found_again(start_anywhere: Start) -> None:
    first = start_anywhere()
    job = first.client.submit(spec(steps=4 * STEPS))
    wait_for_step(first.client, job.id, 20)
    (driver,) = drivers(first, job.id)

    first.kill()
    assert driver.is_running()
    second = start_anywhere()
    assert [process.pid for process in drivers(second, job.id)] == [driver.pid]
    ended = second.client.wait(job.id, timeout_s=60)

    assert (ended.status.phase, ended.status.attempt) == ("SUCCEEDED", 1)
    assert_nothing_lost_or_doubled(second, ended)


def test_job_that_ends_while_the_controller_is_dead_is_counted_as_it_ended(start_anywhere: Start) -> None:
    first = start_anywhere()
    job = first.client.submit(spec())
    wait_for_step(first.client, job.id, 10)

    first.kill()
    wait_until(lambda: not drivers(first, job.id), "the driver has ended", timeout_s=40)
    second = start_anywhere()
    ended = second.client.wait(job.id, timeout_s=60)

    assert (ended.status.phase, ended.status.attempt) == ("SUCCEEDED", 1)
    assert ended.status.progress.step == STEPS
    assert ended.status.result is not None
    assert ended.status.result.metrics["accuracy"] == pytest.approx(0.9)
    assert_nothing_lost_or_doubled(second, ended)


@pytest.mark.parametrize("place", ["after_attempt_commit", "after_spawn", "after_submit"])
def test_controller_that_dies_while_it_starts_an_attempt_starts_it_once(start_anywhere: Start, place: str) -> None:
    first = start_anywhere(failpoint=place)
    job = first.client.submit(spec(steps=60), idempotency_key="once")
    wait_until(first.has_died, f"the controller dies {place}")

    second = start_anywhere()
    ended = second.client.wait(job.id, timeout_s=60)

    assert (ended.status.phase, ended.status.attempt) == ("SUCCEEDED", 1)
    assert_nothing_lost_or_doubled(second, ended)
    log = second.client.logs(job.id)
    assert log.count("attempt 1 of steps") == 1
    assert second.client.submit(spec(steps=60), idempotency_key="once").id == job.id


def test_cancel_that_the_dead_controller_had_taken_is_carried_out(start_anywhere: Start) -> None:
    first = start_anywhere()
    job = first.client.submit(spec(steps=10_000))
    wait_for_step(first.client, job.id, 5)
    first.client.cancel(job.id)

    first.kill()
    second = start_anywhere()

    assert second.client.wait(job.id, timeout_s=60).status.phase == "CANCELLED"
    assert drivers(second, job.id) == []


def test_attempt_that_died_without_a_word_is_followed_by_another(start_anywhere: Start) -> None:
    service = start_anywhere()

    ended = service.client.wait(service.client.submit(spec("dies-once", steps=30)).id, timeout_s=60)

    assert (ended.status.phase, ended.status.attempt) == ("SUCCEEDED", 2)
    phases = [event.data for event in all_events(service.client, ended.id) if event.kind == "phase"]
    assert [data["to"] for data in phases].count("RECOVERING") == 1
    recovering = next(data for data in phases if data["to"] == "RECOVERING")
    assert recovering["reason"] == "DriverLost"
    loss = service.client.metrics(ended.id, names=["loss"]).series["loss"]
    assert loss.steps == list(range(1, 31))


def test_job_whose_attempts_all_die_fails_and_says_how_often(start_anywhere: Start) -> None:
    service = start_anywhere()

    posted = service.client.submit(spec("dies", steps=30, failure={"max_attempts": 2}))
    ended = service.client.wait(posted.id, timeout_s=60)

    assert (ended.status.phase, ended.status.reason) == ("FAILED", "MaxAttemptsExceeded")
    assert ended.status.attempt == 2
    assert "failure.max_attempts is 2" in (ended.status.message or "")


def test_attempts_that_never_started_are_not_counted_as_the_jobs(start_service: Start) -> None:
    service = start_service()

    posted = service.client.submit(spec("late", steps=30, failure={"max_attempts": 1}))
    ended = service.client.wait(posted.id, timeout_s=60)

    assert (ended.status.phase, ended.status.attempt) == ("SUCCEEDED", 4)
    phases = [event.data for event in all_events(service.client, ended.id) if event.kind == "phase"]
    (first, *_) = [data["message"] for data in phases if data["to"] == "RECOVERING"]
    assert first == (
        "attempt 1 died without a result before its workers had started: the driver ended with exit status 9; "
        "1 in a row, the next one starts in 0.1 s"
    )


def test_second_controller_on_the_same_home_is_refused(start_service: Start, tmp_path: Path) -> None:
    start_service()

    with pytest.raises(AssertionError, match=r"another service uses the folder"):
        start_service()
    assert os.listdir(tmp_path / "home" / "runs") == []
