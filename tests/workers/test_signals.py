"""Signals as a request to end in order."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ngd_workers.contract.rundir import Outcome
from ngd_workers.launch.signals import resize_in_order, result_of, told_by_signals, with_signal
from tests.support.attempts import make_attempt, small_spec
from tests.support.deadline import wait_until

STOPPED = Outcome(result="cancelled", step=3)


def test_signal_is_told_at_once_and_leaves_its_name(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path, small_spec())
    before = signal.getsignal(signal.SIGTERM)

    with told_by_signals(attempt, signal.SIGTERM) as is_told:
        assert not is_told()
        os.kill(os.getpid(), signal.SIGTERM)
        assert is_told()
        wait_until(lambda: attempt.stop.exists() and attempt.stop.read_text(), "the file")

    assert signal.getsignal(signal.SIGTERM) is before
    ended = with_signal(attempt, STOPPED)
    assert (ended.result, ended.step) == ("cancelled", 3)
    assert (ended.reason, ended.message) == ("StoppedFromOutside", "stopped by SIGTERM")


def test_signal_that_another_thread_receives_is_told_while_the_main_thread_waits(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path, small_spec())

    with told_by_signals(attempt, signal.SIGTERM) as is_told, ThreadPoolExecutor(1) as thread:

        def receive() -> None:
            time.sleep(0.2)  # until the main thread waits
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
            wait_until(is_told, "the handler in the main thread")

        result_of(thread.submit(receive))


def test_outcome_of_an_attempt_that_no_signal_stopped_stays(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path, small_spec())
    attempt.stop.touch()

    assert with_signal(attempt, STOPPED) == STOPPED
    assert with_signal(attempt, Outcome(result="succeeded")) == Outcome(result="succeeded")


def test_forked_process_ends_by_the_signal_and_stops_nothing(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path, small_spec())

    with told_by_signals(attempt, signal.SIGTERM) as is_told:
        reads, writes = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writes, b".")  # a signal that comes before the fork is complete would be lost
            for _ in range(6000):
                time.sleep(0.01)
            os._exit(0)
        os.read(reads, 1)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)

        assert os.WTERMSIG(status) == signal.SIGTERM
        assert not is_told()
    assert not attempt.stop.exists()


@pytest.fixture
def told() -> Iterator[list[int]]:
    """The signals that came to the handler of before."""
    numbers: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGUSR1, before)


def test_signal_asks_once_for_another_group_and_then_acts_as_before(tmp_path: Path, told: list[int]) -> None:
    attempt = make_attempt(tmp_path, small_spec())

    resize_in_order(attempt, signal.SIGUSR1, "node 7 goes")
    os.kill(os.getpid(), signal.SIGUSR1)
    wait_until(lambda: attempt.resize.exists() and attempt.resize.read_text(), "the file")
    assert not told
    os.kill(os.getpid(), signal.SIGUSR1)

    assert attempt.resize.read_text() == "node 7 goes"
    assert told == [signal.SIGUSR1]
    assert not attempt.stop.exists()


def test_signal_after_the_training_acts_as_before(tmp_path: Path, told: list[int]) -> None:
    attempt = make_attempt(tmp_path, small_spec())

    resize_in_order(attempt, signal.SIGUSR1, "node 7 goes", lambda: False)
    os.kill(os.getpid(), signal.SIGUSR1)
    wait_until(lambda: told, "the handler of before")

    assert not attempt.resize.exists()
