"""What is the local dispatcher's own: it finds its drivers again among the processes of this machine."""

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ngd_service.dispatchers.base import AttemptRef, BackendRefusedError, DispatchError, Launch, Seen
from ngd_service.dispatchers.local import DriverProcess
from ngd_service.job_state import Process
from ngd_workers.contract.rundir import AttemptDir, write_json
from tests.support.attempts import small_spec
from tests.support.backends import REF, LocalBackend, drivers_in, folder_in, is_running, local_backend, wait_for_log
from tests.support.deadline import wait_until

LEAVES_A_CHILD = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True)"


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[LocalBackend]:
    with local_backend(tmp_path) as backend:
        yield backend


@pytest.fixture
def folder(backend: LocalBackend) -> AttemptDir:
    return folder_in(backend)


@pytest.fixture
def dead_driver(folder: AttemptDir) -> Iterator[tuple[psutil.Process, psutil.Process]]:
    """A driver that has ended but that nobody has waited for, and the child that it left behind."""
    folder.path.mkdir(parents=True)
    driver = subprocess.Popen(
        ["python3", "-c", LEAVES_A_CHILD], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert driver.stdout is not None
    left, process = psutil.Process(int(driver.stdout.readline())), psutil.Process(driver.pid)
    wait_until(lambda: process.status() == psutil.STATUS_ZOMBIE, "the driver ends")
    yield process, left
    if left.is_running():
        left.kill()
    driver.communicate()


def launch() -> Launch:
    return Launch(REF, small_spec(name="waits", schedule={"steps": 10}).model_dump(mode="json"), "token")


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_driver_whose_pid_was_not_noted_is_found_by_its_folder(backend: LocalBackend, folder: AttemptDir) -> None:
    backend.dispatcher().submit(launch())
    wait_for_log(backend)
    noted = DriverProcess.model_validate_json(folder.process.read_bytes())

    folder.process.unlink()

    assert is_running(backend.dispatcher())
    assert DriverProcess.model_validate_json(folder.process.read_bytes()).pid == noted.pid


def test_folder_without_a_driver_is_started_again(backend: LocalBackend, folder: AttemptDir) -> None:
    folder.path.mkdir(parents=True)
    dispatcher = backend.dispatcher()
    assert dispatcher.inspect(REF).process is Process.UNKNOWN

    dispatcher.submit(launch())

    assert is_running(dispatcher)


def test_pid_that_belongs_to_another_process_by_now_is_not_the_driver(
    backend: LocalBackend, folder: AttemptDir
) -> None:
    other = psutil.Process()
    folder.path.mkdir(parents=True)
    write_json(folder.process, DriverProcess(pid=other.pid, started_at_s=other.create_time() - 3600))
    dispatcher = backend.dispatcher()

    assert dispatcher.inspect(REF).process is Process.EXITED
    dispatcher.kill(REF)
    assert other.is_running()


def test_kill_ends_what_a_dead_driver_has_left_behind(backend: LocalBackend) -> None:
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True)"
    dispatcher = backend.dispatcher(command=("python3", "-c", child))
    dispatcher.submit(launch())
    left = psutil.Process(int(wait_for_log(backend)))
    wait_until(lambda: dispatcher.inspect(REF).process is Process.EXITED, "the driver ends")
    assert left.is_running()

    dispatcher.kill(REF)

    wait_until(lambda: has_ended(left), "its child is gone")


def test_kill_returns_when_those_are_gone_that_left_group_session_and_parent(backend: LocalBackend) -> None:
    grandchild = "import subprocess; print(subprocess.Popen(['sleep', '600'], start_new_session=True).pid, flush=True)"
    child = f"import subprocess; subprocess.run(['python3', '-c', {grandchild!r}]); import time; time.sleep(600)"
    dispatcher = backend.dispatcher(command=("python3", "-c", child))
    dispatcher.submit(launch())
    left = psutil.Process(int(wait_for_log(backend)))
    driver = DriverProcess.model_validate_json(folder_in(backend).process.read_bytes())
    psutil.Process(driver.pid).kill()
    wait_until(lambda: dispatcher.inspect(REF).process is Process.EXITED, "the driver ends")

    dispatcher.kill(REF)

    assert has_ended(left)


def test_process_of_another_attempt_is_left_alone(backend: LocalBackend) -> None:
    dispatcher = backend.dispatcher()
    dispatcher.submit(launch())
    wait_for_log(backend)

    dispatcher.kill(AttemptRef(REF.job_id, 2))
    dispatcher.kill(AttemptRef(REF.job_id, 11))

    assert is_running(dispatcher)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "the driver was ended by SIGSEGV"),
        ("import sys; sys.exit(7)", "the driver ended with exit status 7"),
    ],
)
def test_driver_that_leaves_no_outcome_is_told_with_its_end(backend: LocalBackend, code: str, words: str) -> None:
    dispatcher = backend.dispatcher(command=("python3", "-c", code))
    dispatcher.submit(launch())

    wait_until(lambda: dispatcher.inspect(REF).process is Process.EXITED, "the driver ends")

    assert dispatcher.inspect(REF) == Seen(Process.EXITED, None, words)


def test_full_disk_neither_fails_the_job_nor_starts_a_second_driver(
    backend: LocalBackend, folder: AttemptDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    dispatcher = backend.dispatcher()
    monkeypatch.setattr("ngd_service.dispatchers.local.write_json", full)
    dispatcher.submit(launch())  # it runs, and nothing can note that it does
    wait_for_log(backend)
    assert not folder.process.exists()
    assert is_running(dispatcher)
    dispatcher.submit(launch())
    monkeypatch.undo()

    assert is_running(dispatcher)
    assert len(drivers_in(folder.path)) == 1


def test_log_that_can_not_be_opened_for_now_is_tried_again(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ngd_service.dispatchers.local.subprocess.Popen", full)

    with pytest.raises(BackendRefusedError, match="No space left on device"):
        backend.dispatcher().submit(launch())


def test_child_of_a_zombie_is_ended(
    backend: LocalBackend, folder: AttemptDir, dead_driver: tuple[psutil.Process, psutil.Process]
) -> None:
    driver, left = dead_driver
    write_json(folder.process, DriverProcess.of(driver))
    dispatcher = backend.dispatcher()
    assert dispatcher.inspect(REF).process is Process.EXITED
    assert left.is_running()

    dispatcher.kill(REF)

    wait_until(lambda: has_ended(left), "its child is gone")


def test_group_noted_before_the_last_boot_is_another_s(
    backend: LocalBackend, folder: AttemptDir, dead_driver: tuple[psutil.Process, psutil.Process]
) -> None:
    driver, left = dead_driver
    noted = DriverProcess.of(driver).model_copy(update={"machine": "before the boot"})
    write_json(folder.process, noted)

    backend.dispatcher().kill(REF)

    assert not has_ended(left)


def test_command_that_is_not_there_is_said_in_one_sentence(backend: LocalBackend) -> None:
    with pytest.raises(DispatchError, match="can't start /nowhere/driver"):
        backend.dispatcher(command=("/nowhere/driver",)).submit(launch())


def test_attempt_whose_driver_is_gone_and_whose_outcome_is_torn_has_none(
    backend: LocalBackend, folder: AttemptDir
) -> None:
    folder.path.mkdir(parents=True)
    folder.process.write_text('{"pid": 1, "started_at_s": 0}')
    folder.outcome.write_text('{"result": "succ')

    assert backend.dispatcher().inspect(REF) == Seen(Process.EXITED, None)
