"""The driver as the service starts it: a real process, a real Ray, real signals."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from ngd_workers.contract.rundir import EXIT_STATUS, AttemptDir, Outcome, write_json
from ngd_workers.launch.attempt import run_rank
from ngd_workers.train.checkpoints import Checkpoints
from tests.support import ROOT
from tests.support.attempts import make_attempt, records, small_spec, spooled
from tests.support.deadline import wait_until
from tests.support.event_service import EventService

pytestmark = pytest.mark.ray

START_S = 120.0  # Ray and its workers import for half a minute on a busy machine
LONG = {"steps": 100_000, "evaluate_every_steps": 100_000}


@contextmanager
def driver(attempt_dir: AttemptDir) -> Iterator[subprocess.Popen[bytes]]:
    """Runs the driver until it ends, or kills it and all below it."""
    command = [sys.executable, "-m", "ngd_workers.launch", str(attempt_dir.path)]
    with attempt_dir.log.open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.wait()
        for child in below:
            child.kill()


def wait_for_end(process: subprocess.Popen[bytes], attempt_dir: AttemptDir) -> Outcome:
    wait_until(lambda: process.poll() is not None, f"driver ends; log:\n{attempt_dir.log}", timeout_s=START_S)
    outcome = attempt_dir.read_outcome()
    assert outcome is not None, attempt_dir.log.read_text()
    assert process.returncode == EXIT_STATUS[outcome.result]
    return outcome


def training_processes(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "RayTrainWorker" in child.name() or "RayTrainWorker" in _title(child)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def step_of(attempt_dir: AttemptDir) -> int:
    if not attempt_dir.spool.exists():
        return 0
    steps = [record.step for record in records(spooled(attempt_dir))]
    return steps[-1] if steps else 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bare", "ddp", "fsdp", "deepspeed"])
def test_two_workers_of_ray_train_under_every_engine(tmp_path, kind):
    job = {"optimizer": {"kind": "ngd", "lr": 0.05, "damping": 0.1, "staleness": {"kind": "fixed", "steps": 2}}}
    alone = make_attempt(tmp_path / "alone", small_spec(**job))
    run_rank(alone)
    attempt = make_attempt(tmp_path / "two", small_spec(engine={"kind": kind}, resources={"workers": 2}, **job))

    with driver(attempt) as process:
        outcome = wait_for_end(process, attempt)

    assert (outcome.result, outcome.step) == ("succeeded", 8), attempt.log.read_text()
    curves = [[record.metrics["loss"] for record in records(spooled(a))] for a in (attempt, alone)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


@pytest.mark.slow
def test_killed_worker_is_replaced_and_training_goes_on_from_the_checkpoint(tmp_path):
    spec = small_spec(resources={"workers": 2}, schedule=LONG, checkpoint={"every_steps": 20})
    attempt = make_attempt(tmp_path, spec)
    checkpoints = Checkpoints(tmp_path / "checkpoints", attempt=1, keep=2)

    with driver(attempt) as process:
        wait_until(lambda: checkpoints.newest_step() >= 20, "first checkpoint", timeout_s=START_S)
        training_processes(process)[-1].send_signal(signal.SIGKILL)
        wait_until(lambda: b"workers_restarted" in attempt.spool.read_bytes(), "restart", timeout_s=START_S)
        process.send_signal(signal.SIGTERM)
        outcome = wait_for_end(process, attempt)

    events = spooled(attempt)
    starts = [event.resumed_step for event in events if event.kind == "started"]
    assert outcome.result == "cancelled"
    assert starts[0] == 0
    assert starts[1] >= 20
    assert starts[1] % 20 == 0
    assert events[-1].kind == "cancelled"
    assert checkpoints.newest_step() == outcome.step > starts[1]
    log = attempt.log.read_text()
    # The other rank waits some seconds for the dead one's word before it says that it stops; Ray may end it before.
    assert "A worker died or was killed" in log
    assert f"resumed from the checkpoint of step {starts[1]}" in log
    assert "Traceback" not in log
    assert "frame #" not in log  # of C++


@pytest.mark.slow
def test_sigterm_to_a_worker_of_ray_saves_a_checkpoint_and_starts_another_group(tmp_path):
    spec = small_spec(
        resources={"workers": 2}, schedule=LONG, checkpoint={"every_steps": 100_000}, failure={"worker_restarts": 0}
    )
    attempt = make_attempt(tmp_path, spec)

    with driver(attempt) as process:
        wait_until(lambda: step_of(attempt) > 5, "some steps", timeout_s=START_S)
        training_processes(process)[-1].send_signal(signal.SIGTERM)
        wait_until(lambda: b"workers_resized" in attempt.spool.read_bytes(), "another group", timeout_s=START_S)
        process.send_signal(signal.SIGTERM)
        outcome = wait_for_end(process, attempt)

    events = spooled(attempt)
    resized = next(event for event in events if event.kind == "workers_resized")
    started = [event.resumed_step for event in events if event.kind == "started"]
    steps = [record.step for record in records(events)]
    assert outcome.result == "cancelled"
    assert "SIGTERM to a worker on" in resized.message
    assert started[1] > 5
    assert steps == list(range(1, len(steps) + 1))  # none is lost, none done again


@pytest.mark.slow
def test_variables_of_a_job_are_there_before_rays_workers_connect(tmp_path):
    spec = small_spec(resources={"workers": 2}, env={"GLOO_SOCKET_IFNAME": "nosuchlink0"})
    attempt = make_attempt(tmp_path, spec)

    with driver(attempt) as process:
        outcome = wait_for_end(process, attempt)

    assert outcome.result == "failed"
    assert "nosuchlink0" in outcome.message


def test_digits_train_on_two_workers_and_the_service_hears_all_of_it(tmp_path):
    spec = small_spec(resources={"workers": 2}, optimizer={"kind": "ngd", "lr": 0.01}, schedule={"epochs": 3})
    with EventService() as service:
        attempt = make_attempt(tmp_path, spec, url=service.url)
        with driver(attempt) as process:
            outcome = wait_for_end(process, attempt)

        assert outcome.result == "succeeded", attempt.log.read_text()
        assert outcome.metrics["accuracy"] > 0.85  # chance is 0.1
        assert service.facts() == spooled(attempt)
        assert service.kinds[0] == "started"
        assert service.kinds[-1] == "done"
        assert "Traceback" not in attempt.log.read_text()
        assert "[rank 0] step" in attempt.rank_log(0).read_text()
        assert attempt.rank_log(1).exists()


def test_hopeless_job_ends_at_its_first_start_with_the_reason(tmp_path):
    spec = small_spec(data={"kind": "idx", "directory": "absent"})
    attempt = make_attempt(tmp_path, spec, data_dir=tmp_path)

    with driver(attempt) as process:
        outcome = wait_for_end(process, attempt)

    assert (outcome.result, outcome.reason, outcome.retryable) == ("failed", "DataNotFound", False)
    assert [event.kind for event in spooled(attempt)] == ["failed"]
    assert "Traceback" not in attempt.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signal_while_ray_starts_ends_in_order_before_any_step(tmp_path, number):
    attempt = make_attempt(tmp_path, small_spec(schedule=LONG, resources={"workers": 2}))

    with driver(attempt) as process:
        wait_until(lambda: psutil.Process(process.pid).children(), "Ray starts", timeout_s=START_S)
        process.send_signal(number)
        outcome = wait_for_end(process, attempt)

    assert (outcome.result, outcome.reason) == ("cancelled", "StoppedFromOutside")
    assert outcome.message == f"stopped by {number.name}"
    assert [event.kind for event in spooled(attempt)][-1] == "cancelled"
    assert "Traceback" not in attempt.log.read_text()


def test_single_worker_that_is_told_to_stop_saves_what_it_has(tmp_path):
    attempt = make_attempt(tmp_path, small_spec(schedule=LONG, checkpoint={"every_steps": 100_000}))

    with driver(attempt) as process:
        wait_until(lambda: step_of(attempt) >= 10, "training", timeout_s=START_S)
        assert psutil.Process(process.pid).children(recursive=True) == []  # no Ray
        process.send_signal(signal.SIGTERM)
        outcome = wait_for_end(process, attempt)

    assert (outcome.result, outcome.reason) == ("cancelled", "StoppedFromOutside")
    assert Checkpoints(tmp_path / "checkpoints", attempt=1, keep=2).newest_step() == outcome.step >= 10


def test_attempt_that_has_ended_is_left_alone(tmp_path):
    attempt = make_attempt(tmp_path, small_spec())
    write_json(attempt.outcome, Outcome(result="cancelled", step=3))

    with driver(attempt) as process:
        assert wait_for_end(process, attempt) == Outcome(result="cancelled", step=3)

    assert not attempt.spool.exists()


@pytest.mark.parametrize("file", ["spec.json", "attempt.json"])
def test_damaged_file_of_the_attempt_is_named(tmp_path, file):
    attempt = make_attempt(tmp_path, small_spec())
    (attempt.path / file).write_text("{}")

    with driver(attempt) as process:
        process.wait(START_S)

    assert process.returncode == EXIT_STATUS["failed"]
    assert file in attempt.log.read_text()
    assert "Traceback" not in attempt.log.read_text()
