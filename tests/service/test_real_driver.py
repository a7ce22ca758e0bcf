"""The controller's death, and the driver's, with nothing simulated: Ray, two workers, a real model, real events."""

import sqlite3
from collections.abc import Callable
from contextlib import closing

import psutil
import pytest

from ngd_service.dispatchers.processes import MARK
from ngd_service.resources import Job, Status
from tests.service.test_crash import all_events, assert_nothing_lost_or_doubled, drivers, wait_for_step
from tests.support.attempts import small_spec
from tests.support.deadline import wait_until
from tests.support.service_process import ServiceProcess

TRAINING_S = 200


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.ray
def test_workers_of_a_killed_driver_end_with_its_attempt(start_service: Callable[..., ServiceProcess]) -> None:
    service = start_service(driver_command=None, retry_backoff_s=5)

    def has_workers_and_agents(job: Job) -> None:
        first = processes_of(f"{job.id}-a1")
        assert sum("RayTrainWorker" in title for title in first.values()) == 2
        assert any("Agent" in title for title in first.values())  # it writes its title over its environment

    status = kill_the_driver_and_go_on(
        service, before=has_workers_and_agents, after=lambda job: processes_of(f"{job.id}-a1") == {}
    )

    assert status.reason == "DriverLost"
    assert "the driver was ended by SIGKILL" in (status.message or "")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("victim", ["raylet/raylet", "gcs/gcs_server", "TrainController"])
def test_death_of_a_part_of_ray_leaves_no_process_and_no_hole(
    start_service: Callable[..., ServiceProcess], victim: str
) -> None:
    service = start_service(driver_command=None, retry_backoff_s=5)

    def kill(job: Job) -> None:
        titles = processes_of(f"{job.id}-a1")
        (pid,) = [pid for pid, title in titles.items() if victim in title.split(" ")[0]]
        psutil.Process(pid).kill()

    kill_the_driver_and_go_on(service, after=lambda job: processes_of(f"{job.id}-a1") == {}, kill=kill)


def kill_the_driver_and_go_on(
    service: ServiceProcess,
    before: Callable[[Job], None] | None = None,
    after: Callable[[Job], bool] | None = None,
    kill: Callable[[Job], None] | None = None,
) -> Status:
    """Returns the status between the attempts; the second one goes on, and no step is missing in the database.

    kill: what is killed in the driver's place.
    """
    long = {"steps": 1_000_000, "evaluate_every_steps": 1_000_000}
    spec = small_spec(name="killed", schedule=long, checkpoint={"every_steps": 10}, resources={"workers": 2})
    client = service.client
    job = client.submit(spec.model_dump(mode="json"))
    wait_for_step(client, job.id, 30, timeout_s=TRAINING_S)
    if before is not None:
        before(job)

    if kill is not None:
        kill(job)
    else:
        (driver,) = drivers(service, job.id)
        driver.kill()
    wait_until(lambda: client.get(job.id).status.phase == "RECOVERING", "the death is seen", timeout_s=TRAINING_S)
    assert after is None or after(job)
    recovering = client.get(job.id).status
    second = service.home / "runs" / job.id / "attempts" / "2" / "events.jsonl"
    wait_until(lambda: second.exists() and b"steps" in second.read_bytes(), "it goes on", timeout_s=TRAINING_S)
    client.cancel(job.id)
    ended = client.wait(job.id, timeout_s=TRAINING_S)

    assert (ended.status.attempt, ended.status.progress.lost_steps) == (2, [])
    with closing(sqlite3.connect(service.home / "ngd.sqlite")) as database:
        steps = [step for (step,) in database.execute("SELECT step FROM steps ORDER BY step")]
    assert steps == list(range(1, len(steps) + 1))
    assert any(event.data.get("resumed_step", 0) > 0 for event in all_events(client, job.id))
    return recovering
