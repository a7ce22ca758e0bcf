"""Takes events from the training loop without ever making it wait, spools them to disk and has them delivered."""

import logging
import queue
import threading
import time
from typing import Protocol

from workers.delivery import Delivery, StopRequest
from workers.events import Event, StepRecord, Steps
from workers.rundir import AttemptDir
from workers.spool import Spool

__all__ = ["Reporter", "SilentReporter", "SpoolingReporter"]

log = logging.getLogger(__name__)

TICK_S = 0.1
GATHER_STEPS = 64
GATHER_S = 0.5
FLUSH_S = 10.0


class Reporter(Protocol):
    """Where the loop puts what it did, and where it sees that it should stop."""

    @property
    def stop_request(self) -> StopRequest | None: ...
    def report(self, event: Event | StepRecord) -> None: ...
    def close(self) -> None: ...


class SilentReporter:
    """The reporter of every rank but 0."""

    stop_request: StopRequest | None = None

    def report(self, event: Event | StepRecord) -> None:
        pass

    def close(self) -> None:
        pass


class SpoolingReporter:
    """Rank 0's reporter: a queue, and one daemon thread that owns the spool and the connection."""

    def __init__(self, attempt_dir: AttemptDir) -> None:
        self._stop_file = attempt_dir.stop
        self._spool = Spool(attempt_dir.spool)
        self._delivery = Delivery(attempt_dir, self._spool)
        self._queue: queue.SimpleQueue[Event | StepRecord] = queue.SimpleQueue()
        self._records: list[StepRecord] = []
        self._gathered_since_s = 0.0
        self._closing = threading.Event()
        self._stop_file_seen = self._stop_file.exists()
        self.is_restart = self._spool.last_seq > 0
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)
        self._thread.start()

    @property
    def stop_request(self) -> StopRequest | None:
        """What the service wants, or "cancelled" when the driver was told to stop."""
        return self._delivery.stop_request or ("cancelled" if self._stop_file_seen else None)

    def report(self, event: Event | StepRecord) -> None:
        """Takes the event; returns at once. Step records are gathered into `Steps` events."""
        self._queue.put(event)

    def close(self) -> None:
        """Writes what is left and gives the service some seconds to take it; the spool keeps what it does not take."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._spool_queue(wait_s=TICK_S)
                self._delivery.push()
                self._stop_file_seen = self._stop_file_seen or self._stop_file.exists()
            self._flush()
        except OSError:
            log.exception("events are no longer recorded")
        finally:
            self._delivery.close()
            self._spool.close()

    def _flush(self) -> None:
        while not self._queue.empty():
            self._spool_queue(wait_s=0)
        self._write_records()
        deadline_s = time.monotonic() + FLUSH_S
        while not self._delivery.is_done and time.monotonic() < deadline_s:
            self._delivery.push(now=True)
            time.sleep(TICK_S)

    def _spool_queue(self, wait_s: float) -> None:
        try:
            event = self._queue.get(timeout=wait_s) if wait_s else self._queue.get_nowait()
            while True:
                self._take(event)
                event = self._queue.get_nowait()
        except queue.Empty:
            pass
        if self._records and time.monotonic() - self._gathered_since_s >= GATHER_S:
            self._write_records()

    def _take(self, event: Event | StepRecord) -> None:
        if not isinstance(event, StepRecord):
            self._write_records()
            self._spool.append(event)
            return
        if not self._records:
            self._gathered_since_s = time.monotonic()
        self._records.append(event)
        if len(self._records) >= GATHER_STEPS:
            self._write_records()

    def _write_records(self) -> None:
        if self._records:
            self._spool.append(Steps(records=self._records))
            self._records = []
