"""Takes events from the training loop without making it wait, spools them to disk and delivers them."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ngd_workers.contract.events import Event, StepRecord, Steps
from ngd_workers.contract.rundir import AttemptDir
from ngd_workers.report.backlog import Backlog
from ngd_workers.report.delivery import Delivery, StopRequest
from ngd_workers.report.spool import Spool

__all__ = ["Reporter", "SilentReporter", "SpoolingReporter", "StopRequest"]

log = logging.getLogger(__name__)

TICK_S = 0.1
GATHER_STEPS = 64
GATHER_S = 0.5
FLUSH_S = 10.0


class Reporter(Protocol):
    """Takes the loop's events, and tells the loop when to stop."""

    @property
    def stop_request(self) -> StopRequest | None: ...
    def report(self, event: Event | StepRecord) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class SilentReporter:
    """The reporter of every rank but 0."""

    stop_request: StopRequest | None = None

    def report(self, event: Event | StepRecord) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


class SpoolingReporter:
    """Rank 0's reporter: a bounded backlog, and one daemon thread that writes the spool and talks to the service.

    If a part of the thread's turn fails, the next turn tries it again, for as long as the attempt runs.
    """

    def __init__(self, attempt_dir: AttemptDir, *, on_restart: Event | None = None) -> None:
        """on_restart: the first event, if an earlier reporter of this attempt has reported its workers."""
        self._files: dict[Path, StopRequest] = {attempt_dir.stop: "cancelled", attempt_dir.resize: "resized"}
        self._spool = Spool(attempt_dir.spool)
        self._delivery = Delivery(attempt_dir, self._spool)
        self._on_restart = on_restart
        self._backlog = Backlog()
        self._records: list[StepRecord] = []
        self._gathered_since_s = 0.0
        self._failing: set[str] = set()
        self._writing = threading.Lock()
        self._closing = threading.Event()
        self._seen: set[StopRequest] = set()
        self._guarded("look for a request to stop", self._look_for_files)
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)
        self._thread.start()

    @property
    def stop_request(self) -> StopRequest | None:
        """The request of the service, or that of a file in the attempt's directory; the one that ends more."""
        if self._delivery.stop_request is not None:
            return self._delivery.stop_request
        return next((request for request in self._files.values() if request in self._seen), None)

    def report(self, event: Event | StepRecord) -> None:
        """Takes the event; returns at once. Step records are gathered into `Steps` events."""
        self._backlog.put(event)

    def flush(self) -> None:
        """Writes the reported events to disk, if the disk takes them now: no checkpoint must be ahead of its steps."""
        self._guarded("write the events", lambda: self._write(everything=True, to_disk=True))

    def close(self) -> None:
        """Writes the remaining events and gives the service FLUSH_S to take them; the spool keeps all events."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(TICK_S):
            self._guarded("write the events", self._write)
            self._guarded("deliver the events", self._delivery.push)
            self._guarded("look for a request to stop", self._look_for_files)
        deadline_s = time.monotonic() + FLUSH_S
        while not self._flush() and time.monotonic() < deadline_s:
            time.sleep(TICK_S)
        if self._is_behind:
            log.error("the last events of this attempt are lost: %s can't be written", self._spool.path)
        self._delivery.close()
        self._guarded("close the spool", self._spool.close)

    def _flush(self) -> bool:
        """Returns whether nothing is left to write or to send."""
        self._guarded("write the events", lambda: self._write(everything=True))
        self._guarded("deliver the events", lambda: self._delivery.push(now=True))
        return not self._is_behind and self._delivery.is_done

    @property
    def _is_behind(self) -> bool:
        return bool(self._records) or not self._backlog.is_empty

    def _guarded(self, action: str, call: Callable[[], None]) -> None:
        """Calls, and logs the first of several failures in a row."""
        try:
            call()
        except OSError as error:
            if action not in self._failing:
                log.error("can't %s: %s; it is tried again", action, error)
                self._failing.add(action)
            self._backlog.note_trouble(str(error))
        except Exception:  # the boundary of this thread: if it died, the job would report no more
            if action not in self._failing:
                log.exception("can't %s; it is tried again", action)
                self._failing.add(action)
        else:
            if action in self._failing:
                log.info("can %s again", action)
                self._failing.discard(action)

    def _look_for_files(self) -> None:
        self._seen |= {request for path, request in self._files.items() if request not in self._seen and path.exists()}

    def _write(self, *, everything: bool = False, to_disk: bool = False) -> None:
        with self._writing:
            self._open()
            while (event := self._backlog.first()) is not None:
                self._take(event)
                self._backlog.remove_first()
            if everything or time.monotonic() - self._gathered_since_s >= GATHER_S:
                self._write_records()
            if to_disk:
                self._spool.sync()

    def _open(self) -> None:
        if self._spool.is_open:
            return
        self._spool.open()
        if self._on_restart is not None and self._spool.has_started:
            self._backlog.put_first(self._on_restart)

    def _take(self, event: Event | StepRecord) -> None:
        if len(self._records) >= GATHER_STEPS or not isinstance(event, StepRecord):
            self._write_records()
        if not isinstance(event, StepRecord):
            self._append(event)
            return
        if not self._records:
            self._gathered_since_s = time.monotonic()
        self._records.append(event)

    def _write_records(self) -> None:
        if self._records:
            self._append(Steps(records=self._records))
            self._records = []

    def _append(self, event: Event) -> None:
        try:
            self._spool.append(event)
        except ValueError:  # invalid Unicode: the service would refuse it for ever, and get no later event
            log.exception("an event of the kind %s is left out", event.kind)
