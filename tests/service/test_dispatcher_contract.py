"""What every dispatcher must do; the local one is shown on real processes."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from service.dispatchers import local
from service.dispatchers.base import AttemptRef, Dispatcher, DispatchError, Launch, Seen
from service.dispatchers.files import AttemptFiles
from service.dispatchers.local import DriverProcess, LocalDispatcher
from service.failpoint import Failpoint
from service.job_state import Process
from tests.support.attempts import small_spec
from tests.support.deadline import wait_until
from tests.support.service_process import FAULT_DRIVER
from workers.rundir import AttemptDir, Outcome, write_json

REF = AttemptRef("job_x", 1)
Make = Callable[..., LocalDispatcher]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Dispatchers as a controller, and the one after its death, would have; nothing answers at their address."""
    made: list[LocalDispatcher] = []

    def make(url: str = "http://127.0.0.1:1", command: tuple[str, ...] = FAULT_DRIVER) -> LocalDispatcher:
        made.append(LocalDispatcher(files(tmp_path, url), command=command, failpoint=Failpoint(None)))
        return made[-1]

    yield make
    for dispatcher in made:
        dispatcher.kill(REF)
        wait_until(lambda dispatcher=dispatcher: not is_running(dispatcher), "the driver is gone")
        # A zombie can be waited for once its last thread has ended.
        wait_until(lambda dispatcher=dispatcher: dispatcher.inspect(REF) and not dispatcher._children, "it is reaped")


def files(tmp_path: Path, url: str = "http://127.0.0.1:1") -> AttemptFiles:
    return AttemptFiles(runs_dir=tmp_path, data_dir=None, worker_url=url, cluster="own")


def launch(name: str = "waits", steps: int = 10) -> Launch:
    return Launch(REF, small_spec(name=name, schedule={"steps": steps}).model_dump(mode="json"), "token")


def is_running(dispatcher: Dispatcher) -> bool:
    return dispatcher.inspect(REF).process is Process.RUNNING


def folder(tmp_path: Path) -> AttemptDir:
    return AttemptDir.of(tmp_path / REF.job_id, REF.number)


def wait_for_log(tmp_path: Path) -> bytes:
    wait_until(lambda: files(tmp_path).tail_log(REF, None)[0], "the driver has written something")
    return files(tmp_path).tail_log(REF, None)[0]


def test_attempt_that_was_never_submitted_is_unknown(make: Make) -> None:
    assert make().inspect(REF).process is Process.UNKNOWN


def test_submitting_twice_starts_once(make: Make, tmp_path: Path) -> None:
    first, second = make(), make()
    first.submit(launch())
    first.submit(launch())
    wait_for_log(tmp_path)

    second.submit(launch())

    assert is_running(second)
    assert files(tmp_path).tail_log(REF, None)[0].count(b"attempt 1") == 1


def test_next_controller_finds_the_driver_and_tells_it_where_to_report(make: Make, tmp_path: Path) -> None:
    make().submit(launch())

    heir = make(url="http://127.0.0.1:2")

    assert is_running(heir)
    assert folder(tmp_path).read_facts().url == "http://127.0.0.1:2"
    assert folder(tmp_path).facts.stat().st_mode & 0o777 == 0o600


def test_driver_whose_pid_was_not_noted_is_found_by_its_folder(make: Make, tmp_path: Path) -> None:
    dispatcher = make()
    dispatcher.submit(launch())
    wait_for_log(tmp_path)
    noted = DriverProcess.model_validate_json(folder(tmp_path).process.read_bytes())

    folder(tmp_path).process.unlink()

    assert is_running(make())
    assert DriverProcess.model_validate_json(folder(tmp_path).process.read_bytes()).pid == noted.pid


def test_folder_without_a_driver_is_started_again(make: Make, tmp_path: Path) -> None:
    folder(tmp_path).path.mkdir(parents=True)
    dispatcher = make()
    assert dispatcher.inspect(REF).process is Process.UNKNOWN

    dispatcher.submit(launch())

    assert is_running(dispatcher)


def test_pid_that_belongs_to_another_process_by_now_is_not_the_driver(make: Make, tmp_path: Path) -> None:
    other = psutil.Process()
    folder(tmp_path).path.mkdir(parents=True)
    write_json(folder(tmp_path).process, DriverProcess(pid=other.pid, started_at_s=other.create_time() - 3600))
    dispatcher = make()

    assert dispatcher.inspect(REF).process is Process.EXITED
    dispatcher.kill(REF)
    assert other.is_running()


def test_outcome_is_seen_once_the_driver_has_gone(make: Make) -> None:
    dispatcher = make()

    dispatcher.submit(launch("refuses"))

    wait_until(lambda: dispatcher.inspect(REF).process is Process.EXITED, "the driver ends")
    outcome = dispatcher.inspect(REF).outcome
    assert outcome is not None
    assert (outcome.result, outcome.reason) == ("failed", "DataNotFound")


def test_driver_killed_by_another_hand_has_no_outcome(make: Make, tmp_path: Path) -> None:
    dispatcher = make()
    dispatcher.submit(launch())
    noted = DriverProcess.model_validate_json(folder(tmp_path).process.read_bytes())

    psutil.Process(noted.pid).kill()

    wait_until(lambda: dispatcher.inspect(REF).process is Process.EXITED, "the death is noticed")
    assert dispatcher.inspect(REF).outcome is None


def test_interrupt_lets_the_driver_end_in_order(make: Make, tmp_path: Path) -> None:
    dispatcher = make()
    dispatcher.submit(launch("waits"))
    wait_for_log(tmp_path)

    dispatcher.interrupt(REF)

    wait_until(lambda: dispatcher.inspect(REF).process is Process.EXITED, "the driver ends", timeout_s=30)
    outcome = dispatcher.inspect(REF).outcome
    assert outcome is not None
    assert outcome.result == "cancelled"


def test_kill_ends_what_a_dead_driver_has_left_behind(make: Make, tmp_path: Path) -> None:
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True)"
    dispatcher = make(command=("python3", "-c", child))
    dispatcher.submit(launch())
    left = psutil.Process(int(wait_for_log(tmp_path)))
    wait_until(lambda: dispatcher.inspect(REF).process is Process.EXITED, "the driver ends")
    assert left.is_running()

    dispatcher.kill(REF)

    wait_until(lambda: has_ended(left), "its child is gone")


LEAVES_A_CHILD = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True)"


@pytest.fixture
def dead_driver(tmp_path: Path) -> Iterator[tuple[psutil.Process, psutil.Process]]:
    """A driver that has ended but that nobody has waited for, and the child that it left behind."""
    folder(tmp_path).path.mkdir(parents=True)
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


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_child_of_a_zombie_is_ended(
    make: Make, tmp_path: Path, dead_driver: tuple[psutil.Process, psutil.Process]
) -> None:
    driver, left = dead_driver
    write_json(folder(tmp_path).process, DriverProcess.of(driver))
    dispatcher = make()
    assert dispatcher.inspect(REF).process is Process.EXITED
    assert left.is_running()

    dispatcher.kill(REF)

    wait_until(lambda: has_ended(left), "its child is gone")


def test_group_noted_before_the_last_boot_is_another_s(
    make: Make, tmp_path: Path, dead_driver: tuple[psutil.Process, psutil.Process]
) -> None:
    driver, left = dead_driver
    noted = DriverProcess.of(driver).model_copy(update={"machine": "before the boot"})
    write_json(folder(tmp_path).process, noted)

    make().kill(REF)

    assert not has_ended(left)


def test_undelivered_events_stop_before_a_torn_line(make: Make, tmp_path: Path) -> None:
    dispatcher = make()
    dispatcher.submit(launch("steps"))
    wait_until(folder(tmp_path).spool.exists, "the spool is there")
    wait_until(lambda: folder(tmp_path).spool.read_bytes().count(b"\n") > 1, "events are spooled")
    dispatcher.kill(REF)
    wait_until(lambda: not is_running(dispatcher), "the driver is gone")
    complete = folder(tmp_path).spool.read_bytes().count(b"\n")
    with folder(tmp_path).spool.open("ab") as spool:
        spool.write(b'{"seq": 99, "time')

    seqs = [event.seq for batch in files(tmp_path).undelivered(REF, 1) for event in batch]

    assert seqs == list(range(2, complete + 1))


def test_command_that_is_not_there_is_said_in_one_sentence(make: Make) -> None:
    with pytest.raises(DispatchError, match="can't start /nowhere/driver"):
        make(command=("/nowhere/driver",)).submit(launch())


def test_stored_spec_that_is_none_any_more_is_refused(make: Make, tmp_path: Path) -> None:
    spec = small_spec().model_dump(mode="json") | {"modle": 1}

    with pytest.raises(DispatchError, match="does not take the stored spec: a job has no field 'modle'"):
        make().submit(Launch(REF, spec, "token"))
    assert not folder(tmp_path).path.exists()


def test_log_is_read_in_pieces_and_from_its_end(tmp_path: Path) -> None:
    folder(tmp_path).path.mkdir(parents=True)
    folder(tmp_path).log.write_bytes(b"one\ntwo\nthree\n")
    read = files(tmp_path)

    assert read.read_log(REF, 4, 4) == b"two\n"
    assert read.tail_log(REF, 2) == (b"two\nthree\n", 14)
    assert read.tail_log(REF, 0) == (b"", 14)
    assert read.read_log(AttemptRef("job_none", 1), 0, 9) == b""


def test_driver_that_stays_after_its_outcome_is_ended(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "LINGER_S", -1.0)
    dispatcher = make()
    dispatcher.submit(launch("deaf"))
    wait_for_log(tmp_path)
    write_json(folder(tmp_path).outcome, Outcome(result="succeeded", step=7))

    seen = dispatcher.inspect(REF)

    assert (seen.process, seen.outcome) == (Process.EXITED, Outcome(result="succeeded", step=7))
    wait_until(lambda: not is_running(dispatcher), "the driver is gone")


def test_outcome_that_can_not_be_read_counts_as_none(make: Make, tmp_path: Path) -> None:
    folder(tmp_path).path.mkdir(parents=True)
    folder(tmp_path).process.write_text('{"pid": 1, "started_at_s": 0}')
    folder(tmp_path).outcome.write_text('{"result": "succ')

    assert make().inspect(REF) == Seen(Process.EXITED, None)
