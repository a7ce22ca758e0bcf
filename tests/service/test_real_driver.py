"""The controller's death, and the driver's, with nothing simulated: Ray, two workers, a real model, real events."""

import sqlite3
from collections.abc import Callable
from contextlib import closing

import psutil
import pytest

from service.dispatchers.processes import MARK
from tests.service.test_crash import all_events, assert_nothing_lost_or_doubled, drivers, wait_for_step
from tests.support.attempts import small_spec
from tests.support.deadline import wait_until
from tests.support.service_process import ServiceProcess

TRAINING_S = 200


@pytest.mark.ray
def test_training_goes_on_while_the_controller_is_dead(start_service: Callable[..., ServiceProcess]) -> None:
    spec = small_spec(
        name="digits",
        model={"kind": "small_cnn", "channels": 4, "hidden": 16},
        optimizer={"kind": "ngd"},
        schedule={"epochs": 10},
        resources={"workers": 2},
    )
    first = start_service(driver_command=None)
    job = first.client.submit(spec.model_dump(mode="json"))
    wait_for_step(first.client, job.id, 5, timeout_s=TRAINING_S)
    (driver,) = drivers(first, job.id)

    first.kill()
    assert driver.is_running()
    second = start_service(driver_command=None)
    ended = second.client.wait(job.id, timeout_s=TRAINING_S)

    assert (ended.status.phase, ended.status.attempt) == ("SUCCEEDED", 1)
    assert drivers(second, job.id) == []
    assert_nothing_lost_or_doubled(second, ended)
    statistics = second.client.statistics(job.id)
    assert len(statistics.ages) == len(statistics.names) > 0


def processes_of(attempt_id: str) -> dict[int, str]:
    """Returns pid -> title of the living processes that carry the attempt's mark."""
    titles = {}
    for process in psutil.process_iter(["status"]):
        try:
            if process.info["status"] != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == attempt_id:
                titles[process.pid] = " ".join(process.cmdline())
        except psutil.Error:
            continue
    return titles


@pytest.mark.ray
def test_workers_of_a_killed_driver_end_with_its_attempt_and_no_step_is_lost(
    start_service: Callable[..., ServiceProcess],
) -> None:
    spec = small_spec(
        name="killed",
        schedule={"steps": 1_000_000, "evaluate_every_steps": 1_000_000},
        checkpoint={"every_steps": 10},
        resources={"workers": 2},
    )
    service = start_service(driver_command=None, retry_backoff_s=5)
    client = service.client
    job = client.submit(spec.model_dump(mode="json"))
    wait_for_step(client, job.id, 30, timeout_s=TRAINING_S)
    first = processes_of(f"{job.id}-a1")
    assert sum("RayTrainWorker" in title for title in first.values()) == 2
    assert any("Agent" in title for title in first.values())  # it writes its title over its environment

    (driver,) = drivers(service, job.id)
    driver.kill()
    wait_until(lambda: client.get(job.id).status.phase == "RECOVERING", "the death is seen")
    assert processes_of(f"{job.id}-a1") == {}
    recovering = client.get(job.id).status
    wait_until(lambda: client.get(job.id).status.attempt == 2, "the second attempt", timeout_s=TRAINING_S)
    began = service.home / "runs" / job.id / "attempts" / "2" / "events.jsonl"
    wait_until(lambda: began.exists() and b"steps" in began.read_bytes(), "it goes on", timeout_s=TRAINING_S)
    client.cancel(job.id)
    ended = client.wait(job.id, timeout_s=TRAINING_S)

    assert recovering.reason == "DriverLost"
    assert "the driver was ended by SIGKILL" in (recovering.message or "")
    assert ended.status.progress.lost_steps == []
    with closing(sqlite3.connect(service.home / "ngd.sqlite")) as database:
        steps = [step for (step,) in database.execute("SELECT step FROM steps ORDER BY step")]
    assert steps == list(range(1, len(steps) + 1))
    assert any(event.data.get("resumed_step", 0) > 0 for event in all_events(client, job.id))
    assert processes_of(f"{job.id}-a2") == {}
