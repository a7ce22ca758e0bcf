"""Signals as a request to end in order. Imports without torch."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from ngd_workers.contract.errors import StorageError
from ngd_workers.contract.patience import insist
from ngd_workers.contract.rundir import AttemptDir, Outcome

__all__ = ["stop_in_order", "told_by_signals", "with_signal"]

log = logging.getLogger(__name__)

STOP_S = 600.0


def stop_in_order(
    attempt_dir: AttemptDir, numbers: Sequence[signal.Signals], also: Callable[[], None] = lambda: None
) -> None:
    """Makes these signals ask the attempt to stop after the current step. Main thread only."""
    process = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a fork, such as one of a user's pool: it ends as if this handler were not there
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        also()
        name = signal.Signals(number).name
        log.info("%s: the workers stop after the current step", name)
        # In a thread: the main thread must neither wait for the disk nor meet its errors.
        threading.Thread(target=_ask_to_stop, args=(attempt_dir.stop, name), daemon=True).start()

    for number in numbers:
        signal.signal(number, stop)


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


def with_signal(attempt_dir: AttemptDir, outcome: Outcome) -> Outcome:
    """Returns the outcome, with the name of the signal if one stopped the attempt."""
    if outcome.result == "cancelled":
        with contextlib.suppress(OSError):
            if name := attempt_dir.stop.read_text():
                return outcome.model_copy(update={"reason": "StoppedFromOutside", "message": f"stopped by {name}"})
    return outcome


def _ask_to_stop(path: Path, signal_name: str) -> None:
    try:
        insist(lambda: path.write_text(signal_name), f"write {path}", patience_s=STOP_S)
    except StorageError as error:
        log.error("%s", error)
