import socket
import time

import pytest

from ngd_workers.contract.events import Cancelled, StepRecord
from ngd_workers.report import delivery, reporter
from ngd_workers.report.delivery import TIMEOUT_S
from ngd_workers.report.reporter import SpoolingReporter
from tests.support.attempts import make_attempt, records, small_spec, spooled, write_facts
from tests.support.deadline import wait_until
from tests.support.event_service import EventService


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(delivery, "INTERVAL_S", 0.05)
    monkeypatch.setattr(delivery, "FIRST_RETRY_S", 0.02)
    monkeypatch.setattr(delivery, "LAST_RETRY_S", 0.1)
    monkeypatch.setattr(reporter, "FLUSH_S", 0.5)


def step(number: int) -> StepRecord:
    return StepRecord(step=number, epoch=0.0, time_s=0.0, metrics={"loss": float("nan"), "accuracy": 0.0}, lr=0.1)


def test_events_arrive_in_order_with_the_token(tmp_path):
    with EventService() as service:
        attempt = make_attempt(tmp_path, small_spec(), url=service.url)
        reporting = SpoolingReporter(attempt)
        for number in range(1, 200):
            reporting.report(step(number))
        reporting.report(Cancelled(step=199))
        reporting.close()

        assert service.facts()[-1] == Cancelled(step=199)
        assert [record.step for record in records(service.facts())] == list(range(1, 200))
        assert service.kinds.count("steps") < 10
        assert service.tokens == {"Bearer secret"}


def test_nothing_is_lost_or_doubled_while_the_service_is_down_and_moves(tmp_path):
    service = EventService().start()
    attempt = make_attempt(tmp_path, small_spec(), url=service.url)
    reporting = SpoolingReporter(attempt)
    reporting.report(Cancelled(step=1))
    wait_until(lambda: 1 in service.events, "first event")
    service.stop()

    for number in range(2, 1200):
        reporting.report(Cancelled(step=number))
    wait_until(lambda: len(attempt.spool.read_bytes().splitlines()) == 1199, "spool grows")
    with service:
        write_facts(attempt, tmp_path, url=service.url)
        wait_until(lambda: len(service.events) == 1199, "spool replays")
        reporting.close()

        assert [event.step for event in service.facts()] == list(range(1, 1200))
        assert max(service.batch_sizes) <= delivery.BATCH_EVENTS


def test_event_whose_reply_was_lost_is_kept_once(tmp_path):
    with EventService() as service:
        service.lose_replies = 1
        reporting = SpoolingReporter(make_attempt(tmp_path, small_spec(), url=service.url))
        reporting.report(Cancelled(step=1))
        reporting.report(Cancelled(step=2))
        wait_until(lambda: service.lose_replies == 0, "a lost reply")
        reporting.close()

        assert [event.step for event in service.facts()] == [1, 2]


def test_restart_goes_on_after_the_last_whole_line(tmp_path):
    attempt = make_attempt(tmp_path, small_spec())
    first = SpoolingReporter(attempt)
    first.report(Cancelled(step=1))
    first.report(Cancelled(step=2))
    first.close()
    attempt.spool.write_bytes(attempt.spool.read_bytes()[:-5])

    with EventService() as service:
        write_facts(attempt, tmp_path, url=service.url)
        second = SpoolingReporter(attempt)
        second.report(Cancelled(step=3))
        second.close()

        assert [event.step for event in service.facts()] == [event.step for event in spooled(attempt)] == [1, 3]


def test_cancel_comes_back_with_a_reply_even_when_there_is_nothing_to_say(tmp_path):
    with EventService() as service:
        reporting = SpoolingReporter(make_attempt(tmp_path, small_spec(), url=service.url))
        assert reporting.stop_request is None
        service.desired = "CANCELLED"

        wait_until(lambda: reporting.stop_request == "cancelled", "cancel")
        reporting.close()


def test_conflict_means_superseded(tmp_path):
    with EventService() as service:
        service.status = 409
        reporting = SpoolingReporter(make_attempt(tmp_path, small_spec(), url=service.url))

        wait_until(lambda: reporting.stop_request == "superseded", "superseded")
        reporting.close()


@pytest.mark.parametrize("status", [401, 500, 503])
def test_error_is_tried_again(tmp_path, status):
    with EventService() as service:
        service.status = status
        reporting = SpoolingReporter(make_attempt(tmp_path, small_spec(), url=service.url))
        reporting.report(Cancelled(step=1))
        wait_until(lambda: len(service.tokens) > 0, "a refused post")
        service.status = 200

        wait_until(lambda: service.kinds == ["cancelled"], "event after the error")
        reporting.close()


def test_stop_file_asks_to_cancel(tmp_path):
    attempt = make_attempt(tmp_path, small_spec())
    reporting = SpoolingReporter(attempt)
    attempt.stop.touch()

    wait_until(lambda: reporting.stop_request == "cancelled", "stop file")
    reporting.close()


def test_reporting_never_waits_for_the_service(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        reporting = SpoolingReporter(make_attempt(tmp_path, small_spec(), url=url))

        start_s = time.perf_counter()
        for number in range(1, 1001):
            reporting.report(step(number))
        elapsed_s = time.perf_counter() - start_s

    reporting.close()
    assert elapsed_s < TIMEOUT_S  # one post alone waits longer
