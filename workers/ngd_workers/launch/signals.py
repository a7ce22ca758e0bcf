"""Signals as a request to end in order. Imports without torch."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from types import FrameType
from typing import TypeVar

from ngd_workers.contract.errors import StorageError
from ngd_workers.contract.patience import insist
from ngd_workers.contract.rundir import AttemptDir, Outcome

__all__ = ["resize_in_order", "result_of", "stop_in_order", "told_by_signals", "with_signal"]

log = logging.getLogger(__name__)

STOP_S = 600.0
WAKES_S = 0.5  # between two looks of a wait for signals

Result = TypeVar("Result")


def stop_in_order(
    attempt_dir: AttemptDir, numbers: Sequence[signal.Signals], also: Callable[[], None] = lambda: None
) -> None:
    """Makes these signals ask the attempt to stop after the current step. Main thread only."""

    def stop(number: int) -> None:
        also()
        name = signal.Signals(number).name
        log.info("%s: the workers stop after the current step", name)
        _ask(attempt_dir.stop, name)

    for number in numbers:
        _handle(number, stop)


def resize_in_order(
    attempt_dir: AttemptDir, number: signal.Signals, reason: str, is_training: Callable[[], bool] = lambda: True
) -> None:
    """Makes this signal ask for another group of workers after the current step; a second one acts as before.

    Main thread only. reason: goes into the event, unless there is another one. is_training: if not, the first signal
    acts as before, too.
    """
    before = signal.getsignal(number)

    def ask(_: int) -> None:
        signal.signal(number, signal.SIG_DFL if before is None else before)
        if not is_training():
            os.kill(os.getpid(), number)
            return
        log.info("%s: the workers save a checkpoint and make room for others", reason)
        _ask(attempt_dir.resize, reason)

    _handle(number, ask)


@contextlib.contextmanager
def told_by_signals(attempt_dir: AttemptDir, *numbers: signal.Signals) -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether one of the signals has come to this process. Main thread only."""
    told = threading.Event()
    before = {number: signal.getsignal(number) for number in numbers}
    stop_in_order(attempt_dir, numbers, also=told.set)
    try:
        yield told.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def result_of(future: Future[Result]) -> Result:
    """Returns the future's result; signals are handled meanwhile. Main thread only.

    Handlers run in the main thread alone, but the kernel may give a signal to any, and does not wake this one then: a
    wait without an end would keep a request to stop until all has been done.
    """
    while not wait([future], timeout=WAKES_S).done:
        pass
    return future.result()


def with_signal(attempt_dir: AttemptDir, outcome: Outcome) -> Outcome:
    """Returns the outcome, with the name of the signal if one stopped the attempt."""
    if outcome.result == "cancelled":
        with contextlib.suppress(OSError):
            if name := attempt_dir.stop.read_text():
                return outcome.model_copy(update={"reason": "StoppedFromOutside", "message": f"stopped by {name}"})
    return outcome


def _handle(number: signal.Signals, act: Callable[[int], None]) -> None:
    """Makes this process, and none that is forked from it, handle a signal."""
    process = os.getpid()

    def handler(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:
            act(number)
            return
        # Of a fork, such as one of a user's pool: it ends as if this handler were not there.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(number, handler)


def _ask(path: Path, text: str) -> None:
    """Writes a request in a thread: the main thread must neither wait for the disk nor meet its errors."""

    def write() -> None:
        try:
            insist(lambda: path.exists() or path.write_text(text), f"write {path}", patience_s=STOP_S)
        except StorageError as error:
            log.error("%s", error)

    threading.Thread(target=write, daemon=True).start()
