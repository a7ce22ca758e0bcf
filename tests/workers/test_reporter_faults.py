"""What a reporter does while its files can't be written or read: it goes on, and what it could not keep it says."""

import errno
import threading

import pytest

from ngd_workers.contract.events import Cancelled, StepsLost, WorkersRestarted
from ngd_workers.report import backlog, delivery, reporter
from ngd_workers.report.backlog import Backlog
from ngd_workers.report.reporter import SpoolingReporter
from tests.support.attempts import make_attempt, records, small_spec, spooled
from tests.support.deadline import wait_until
from tests.support.event_service import EventService
from tests.support.fault_driver import step_record
from tests.support.faulty_files import ERRORS, Faults

TICKS = 4  # of failure: the reporter has to come back more than once


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(delivery, "INTERVAL_S", 0.05)
    monkeypatch.setattr(delivery, "FIRST_RETRY_S", 0.02)
    monkeypatch.setattr(delivery, "LAST_RETRY_S", 0.1)
    monkeypatch.setattr(reporter, "TICK_S", 0.02)
    monkeypatch.setattr(reporter, "GATHER_S", 0.05)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("operation", ["open", "os.open", "write", "truncate", "pread", "stat", "fsync"])
def test_no_failing_file_operation_loses_an_event_or_a_cancel(tmp_path, monkeypatch, operation, error):
    with EventService() as service:
        attempt = make_attempt(tmp_path, small_spec(), url=service.url)
        faults = Faults(attempt.path, monkeypatch)
        if operation in ("truncate",):
            attempt.spool.write_bytes(b'{"seq":1')  # torn: the first line cuts it off
        faults.fail(operation, ERRORS[error], TICKS)
        reporting = SpoolingReporter(attempt)
        for number in range(1, 200):
            reporting.report(step_record(number))
        reporting.flush()
        wait_until(lambda: faults._left[operation] == 0 or operation == "fsync", "it has failed")
        service.desired = "CANCELLED"
        wait_until(lambda: reporting.stop_request == "cancelled", "cancel")
        reporting.report(Cancelled(step=199))
        reporting.close()

        assert faults.counted[operation] > 0
        assert [record.step for record in records(service.facts())] == list(range(1, 200))
        assert service.facts() == spooled(attempt)
        assert service.kinds[-1] == "cancelled"


def test_line_that_was_written_in_part_is_written_again_as_a_whole(tmp_path, monkeypatch):
    attempt = make_attempt(tmp_path, small_spec())
    faults = Faults(attempt.path, monkeypatch)
    write = reporter.Spool.append.__globals__["os"].write
    is_first = threading.Event()

    def half(file: int, data: bytes) -> int:
        if not is_first.is_set():
            is_first.set()
            faults.fail("write", errno.ENOSPC, 1)
            data = data[: len(data) // 2]
            return data and __import__("posix").write(file, data)
        return write(file, data)

    monkeypatch.setattr("os.write", half)
    reporting = SpoolingReporter(attempt)
    reporting.report(Cancelled(step=1))
    reporting.report(Cancelled(step=2))
    reporting.close()

    assert [event.step for event in spooled(attempt)] == [1, 2]


def test_stop_file_is_seen_while_nothing_can_be_written(tmp_path, monkeypatch):
    attempt = make_attempt(tmp_path, small_spec())
    faults = Faults(attempt.path, monkeypatch)
    faults.fail("write", errno.ENOSPC, 1_000_000)
    reporting = SpoolingReporter(attempt)
    reporting.report(Cancelled(step=1))

    attempt.stop.touch()

    wait_until(lambda: reporting.stop_request == "cancelled", "stop file")
    faults.stop()
    reporting.close()
    assert [event.step for event in spooled(attempt)] == [1]


def test_what_finds_no_room_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(backlog, "MAX_STEPS", 50)
    attempt = make_attempt(tmp_path, small_spec())
    faults = Faults(attempt.path, monkeypatch)
    faults.fail("write", errno.ENOSPC, 1_000_000)
    reporting = SpoolingReporter(attempt)
    reporting.report(step_record(1))
    wait_until(lambda: faults.counted["write"] > 1, "the disk is seen to be full")
    for number in range(2, 301):
        reporting.report(step_record(number))
    assert len(reporting._backlog._events) <= 50
    faults.stop()
    wait_until(lambda: not reporting._backlog._events, "what had waited is written")

    reporting.report(step_record(301))
    reporting.close()

    (lost,) = [event for event in spooled(attempt) if isinstance(event, StepsLost)]
    steps = [record.step for record in records(spooled(attempt))]
    assert steps == [*range(1, lost.first_step), *range(lost.last_step + 1, 302)]
    assert lost.last_step == 300
    assert "No space left on device" in lost.message


def test_rare_events_find_room_when_steps_do_not_any_more(monkeypatch):
    monkeypatch.setattr(backlog, "MAX_STEPS", 2)
    waiting = Backlog()
    for number in range(1, 5):
        waiting.put(step_record(number))
    waiting.put(Cancelled(step=4))

    taken = []
    while (event := waiting.first()) is not None:
        taken.append(event)
        waiting.remove_first()

    assert [getattr(event, "kind", "step") for event in taken] == ["step", "step", "steps_lost", "cancelled"]
    assert (taken[2].first_step, taken[2].last_step) == (3, 4)


def test_event_that_can_not_be_text_does_not_hold_up_the_others(tmp_path):
    attempt = make_attempt(tmp_path, small_spec())
    reporting = SpoolingReporter(attempt)
    reporting.report(WorkersRestarted(message="\ud800"))
    reporting.report(Cancelled(step=1))
    reporting.close()

    assert [event.kind for event in spooled(attempt)] == ["cancelled"]
