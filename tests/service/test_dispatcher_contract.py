"""What every dispatcher must do, shown on real processes; what only one of them does is in a file of its own."""

from collections.abc import Iterator

import pytest

from ngd_service.dispatchers.base import AttemptRef, DispatchError, Launch
from ngd_service.dispatchers.log_file import LogPart
from ngd_service.job_state import Process
from ngd_workers.contract.rundir import Outcome, write_json
from tests.support.attempts import small_spec
from tests.support.backends import (
    Backend,
    drivers_in,
    folder_in,
    is_running,
    kuberay_backend,
    local_backend,
    ray_jobs_backend,
    wait_for_log,
)
from tests.support.deadline import wait_until


@pytest.fixture(params=["local", pytest.param("ray_jobs", marks=pytest.mark.ray), "kuberay"])
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    runs_dir = tmp_path_factory.mktemp("runs")
    if request.param == "local":
        with local_backend(runs_dir) as backend:
            yield backend
    elif request.param == "ray_jobs":
        with ray_jobs_backend(runs_dir, request.getfixturevalue("ray_head")) as backend:
            yield backend
    else:
        with kuberay_backend(runs_dir, request.getfixturevalue("kube_cluster")) as backend:
            yield backend


def launch(backend: Backend, name: str = "waits", steps: int = 10) -> Launch:
    return Launch(backend.ref, small_spec(name=name, schedule={"steps": steps}).model_dump(mode="json"), "token")


def test_attempt_that_was_never_submitted_is_unknown(backend: Backend) -> None:
    dispatcher = backend.dispatcher()

    assert dispatcher.inspect(backend.ref).process is Process.UNKNOWN
    dispatcher.interrupt(backend.ref)
    dispatcher.kill(backend.ref)
    assert dispatcher.inspect(backend.ref).process is Process.UNKNOWN


def test_submitting_twice_starts_once(backend: Backend) -> None:
    first, second = backend.dispatcher(), backend.dispatcher()
    first.submit(launch(backend))
    first.submit(launch(backend))
    wait_for_log(backend)

    second.submit(launch(backend))

    assert is_running(second, backend.ref)
    assert backend.files().log(backend.ref).tail().text.count(b"attempt 1") == 1


def test_submitting_after_the_end_starts_nothing(backend: Backend) -> None:
    dispatcher = backend.dispatcher()
    dispatcher.submit(launch(backend, "refuses"))
    wait_until(lambda: dispatcher.inspect(backend.ref).process is Process.EXITED, "the driver ends")
    dispatcher.kill(backend.ref)

    backend.dispatcher().submit(launch(backend, "refuses"))

    assert dispatcher.inspect(backend.ref).process is Process.EXITED
    assert backend.files().log(backend.ref).tail().text.count(b"attempt 1") == 1


def test_next_controller_finds_the_driver_and_tells_it_where_to_report(backend: Backend) -> None:
    backend.dispatcher().submit(launch(backend))

    heir = backend.dispatcher(url="http://127.0.0.1:2")

    assert is_running(heir, backend.ref)
    assert folder_in(backend).read_facts().url == "http://127.0.0.1:2"
    assert folder_in(backend).facts.stat().st_mode & 0o777 == 0o600


def test_outcome_is_seen_once_the_driver_has_gone(backend: Backend) -> None:
    dispatcher = backend.dispatcher()

    dispatcher.submit(launch(backend, "refuses"))

    wait_until(lambda: dispatcher.inspect(backend.ref).process is Process.EXITED, "the driver ends")
    outcome = dispatcher.inspect(backend.ref).outcome
    assert outcome is not None
    assert (outcome.result, outcome.reason) == ("failed", "DataNotFound")


def test_driver_killed_by_another_hand_has_no_outcome(backend: Backend) -> None:
    dispatcher = backend.dispatcher()
    dispatcher.submit(launch(backend))
    wait_for_log(backend)

    (driver,) = drivers_in(folder_in(backend).path)
    driver.kill()

    wait_until(lambda: dispatcher.inspect(backend.ref).process is Process.EXITED, "the death is noticed")
    assert dispatcher.inspect(backend.ref).outcome is None


def test_interrupt_lets_the_driver_end_in_order(backend: Backend) -> None:
    dispatcher = backend.dispatcher()
    dispatcher.submit(launch(backend, "waits"))
    wait_for_log(backend)

    dispatcher.interrupt(backend.ref)

    wait_until(lambda: dispatcher.inspect(backend.ref).process is Process.EXITED, "the driver ends", timeout_s=30)
    outcome = dispatcher.inspect(backend.ref).outcome
    assert outcome is not None
    assert outcome.result == "cancelled"


def test_kill_ends_a_driver_that_hears_nothing(backend: Backend) -> None:
    dispatcher = backend.dispatcher()
    dispatcher.submit(launch(backend, "deaf"))
    wait_for_log(backend)
    dispatcher.interrupt(backend.ref)
    assert is_running(dispatcher, backend.ref)

    dispatcher.kill(backend.ref)
    dispatcher.kill(backend.ref)

    wait_until(lambda: not is_running(dispatcher, backend.ref), "the driver is gone")
    assert drivers_in(folder_in(backend).path) == []
    assert dispatcher.inspect(backend.ref).process is Process.EXITED
    dispatcher.kill(backend.ref)


def test_undelivered_events_stop_before_a_torn_line(backend: Backend) -> None:
    dispatcher = backend.dispatcher()
    dispatcher.submit(launch(backend, "steps"))
    spool = folder_in(backend).spool
    wait_until(spool.exists, "the spool is there")
    wait_until(lambda: spool.read_bytes().count(b"\n") > 1, "events are spooled")
    dispatcher.kill(backend.ref)
    wait_until(lambda: not is_running(dispatcher, backend.ref), "the driver is gone")
    complete = spool.read_bytes().count(b"\n")
    with spool.open("ab") as file:
        file.write(b'{"seq": 99, "time')

    seqs = [event.seq for batch in backend.files().undelivered(backend.ref, 1) for event in batch]

    assert seqs == list(range(2, complete + 1))


def test_stored_spec_that_is_none_any_more_is_refused(backend: Backend) -> None:
    spec = small_spec().model_dump(mode="json") | {"modle": 1}

    with pytest.raises(DispatchError, match="does not take the stored spec: a job has no field 'modle'"):
        backend.dispatcher().submit(Launch(backend.ref, spec, "token"))
    assert not folder_in(backend).path.exists()


def test_log_is_read_in_pieces_and_from_its_end(backend: Backend) -> None:
    folder_in(backend).path.mkdir(parents=True)
    folder_in(backend).log.write_bytes(b"one\ntwo\nthree\n")
    read = backend.files()

    assert read.log(backend.ref).read(4, 4) == b"two\n"
    assert read.log(backend.ref).tail(2) == LogPart(b"two\nthree\n", 4, 14)
    assert read.log(backend.ref).tail(0) == LogPart(b"", 14, 14)
    assert read.log(AttemptRef("job_none", 1)).read(0, 9) == b""


def test_driver_that_stays_after_its_outcome_is_ended(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.module, "LINGER_S", -1.0)
    dispatcher = backend.dispatcher()
    dispatcher.submit(launch(backend, "deaf"))
    wait_for_log(backend)
    write_json(folder_in(backend).outcome, Outcome(result="succeeded", step=7))

    seen = dispatcher.inspect(backend.ref)

    assert (seen.process, seen.outcome) == (Process.EXITED, Outcome(result="succeeded", step=7))
    wait_until(lambda: not drivers_in(folder_in(backend).path), "the driver is gone")


def test_outcome_that_can_not_be_read_counts_as_none(backend: Backend) -> None:
    dispatcher = backend.dispatcher()
    dispatcher.submit(launch(backend, "dies"))
    wait_for_log(backend)
    folder_in(backend).outcome.write_text('{"result": "succ')

    wait_until(lambda: dispatcher.inspect(backend.ref).process is Process.EXITED, "the driver ends")
    assert dispatcher.inspect(backend.ref).outcome is None
