"""Files of an attempt that can't be read or written for a moment, or for longer: what driver and loop make of it."""

import errno
import sys

import pytest

from ngd_workers.contract import patience
from ngd_workers.contract.errors import StorageError
from ngd_workers.contract.patience import insist
from ngd_workers.contract.rundir import EXIT_STATUS
from ngd_workers.launch import driver, ending
from ngd_workers.train import loop, saves
from tests.support.attempts import make_attempt, small_spec, spooled
from tests.support.faulty_files import ERRORS, Faults

FOREVER = 1_000_000


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(patience, "AGAIN_S", 0.02)
    monkeypatch.setattr(driver, "_log_to_stderr", lambda: None)  # so does its log
    monkeypatch.setattr(driver, "stop_in_order", lambda attempt_dir, numbers: None)  # pytest's own stay


def at_the_start(monkeypatch, call) -> None:
    monkeypatch.setattr(driver, "_refuse_to_be_second", lambda attempt_dir: call())


def run_driver(attempt, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["driver", str(attempt.path)])
    with pytest.raises(SystemExit) as ended:
        driver.main()
    return ended.value.code


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("operation", ["open", "os.open", "write", "stat", "replace"])
def test_attempt_outlives_a_moment_of_failing_files(tmp_path, monkeypatch, operation, error):
    attempt = make_attempt(tmp_path, small_spec())
    faults = Faults(attempt.path, monkeypatch)
    at_the_start(monkeypatch, lambda: faults.fail(operation, ERRORS[error], 2))

    status = run_driver(attempt, monkeypatch)

    assert status == EXIT_STATUS["succeeded"]
    outcome = attempt.read_outcome()
    assert outcome is not None
    assert (outcome.result, outcome.step) == ("succeeded", 8)
    assert spooled(attempt)[-1].kind == "done"


def test_single_worker_of_a_machine_of_its_own_needs_no_ray(tmp_path, monkeypatch):
    attempt = make_attempt(tmp_path, small_spec())
    monkeypatch.setitem(sys.modules, "ray", None)

    assert run_driver(attempt, monkeypatch) == EXIT_STATUS["succeeded"]
    assert next(event.kind for event in spooled(attempt)) == "started"


def test_single_worker_that_failed_is_started_again_from_the_checkpoint(tmp_path, monkeypatch):
    attempt = make_attempt(tmp_path, small_spec(failure={"worker_restarts": 1}))
    is_first, step_once = [True], loop.Run.step_once

    def fails_once(run):
        if is_first and run.progress.step == 4:
            is_first.pop()
            raise RuntimeError("a fault of the machine")
        step_once(run)

    monkeypatch.setattr(loop.Run, "step_once", fails_once)

    assert run_driver(attempt, monkeypatch) == EXIT_STATUS["succeeded"]
    starts = [event.resumed_step for event in spooled(attempt) if event.kind == "started"]
    assert starts == [0, 4]
    assert "workers_restarted" in [event.kind for event in spooled(attempt)]


def test_single_worker_that_fails_too_often_ends_the_attempt_with_its_last_words(tmp_path, monkeypatch):
    attempt = make_attempt(tmp_path, small_spec(failure={"worker_restarts": 1}))
    monkeypatch.setattr(loop.Run, "step_once", lambda run: 1 / 0)

    assert run_driver(attempt, monkeypatch) == EXIT_STATUS["failed"]
    outcome = attempt.read_outcome()
    assert outcome is not None
    assert outcome.retryable
    assert outcome.message == "the workers failed after 1 restarts (failure.worker_restarts); division by zero"


def test_outcome_that_can_not_be_written_leaves_none_and_says_so(tmp_path, monkeypatch, caplog):
    attempt = make_attempt(tmp_path, small_spec())
    faults = Faults(attempt.path, monkeypatch)
    monkeypatch.setattr(ending, "OUTCOME_S", 0.1)
    monkeypatch.setattr(
        driver, "_refuse_to_be_second", lambda attempt_dir: faults.fail("replace", errno.ENOSPC, FOREVER)
    )

    assert run_driver(attempt, monkeypatch) == EXIT_STATUS["failed"]
    assert attempt.read_outcome() is None
    assert "outcome.json, tried for 0.1 s" in caplog.text


def test_checkpoint_that_can_not_be_written_is_left_out_and_told(tmp_path, monkeypatch):
    attempt = make_attempt(tmp_path, small_spec())
    faults = Faults(tmp_path / "checkpoints", monkeypatch)
    at_the_start(monkeypatch, lambda: faults.fail("fsync", errno.ENOSPC, 1))

    assert run_driver(attempt, monkeypatch) == EXIT_STATUS["succeeded"]
    (failed,) = [event for event in spooled(attempt) if event.kind == "checkpoint_failed"]
    assert failed.step == 2
    assert "No space left on device" in failed.message
    assert [event.step for event in spooled(attempt) if event.kind == "checkpoint"] == [4, 6, 8]


def test_last_checkpoint_is_the_result_and_its_loss_a_failure(tmp_path, monkeypatch):
    attempt = make_attempt(tmp_path, small_spec())
    faults = Faults(tmp_path / "checkpoints", monkeypatch)
    monkeypatch.setattr(saves, "LAST_CHECKPOINT_S", 0.1)
    monkeypatch.setattr(driver, "_refuse_to_be_second", lambda attempt_dir: faults.fail("fsync", errno.ENOSPC, FOREVER))

    assert run_driver(attempt, monkeypatch) == EXIT_STATUS["failed"]
    outcome = attempt.read_outcome()
    assert outcome is not None
    assert (outcome.reason, outcome.retryable) == ("StorageUnavailable", True)


def test_patience_ends_with_the_file_the_time_and_the_cause():
    def call() -> None:
        raise OSError(5, "Input/output error")

    with pytest.raises(StorageError, match=r"can't read the spec, tried for 0.05 s: .*Input/output error"):
        insist(call, "read the spec", patience_s=0.05)
