"""An attempt's events on disk, one Numbered event a line. A line's number is its seq, so seq has no gaps."""

import os
import time
from pathlib import Path

from ngd_workers.contract.events import Event, Numbered

__all__ = ["Spool"]

STARTED = b'"event":{"kind":"started"'
STARTED_WITHIN = 100  # bytes: seq and time come before it


class Spool:
    """Append-only file of events with one writer at a time. Opening cuts off a torn last line, left by a crash.

    A call that raises an OSError may be repeated: a line that was written in part is cut off before the next one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None
        self._ends = [0]
        self._is_torn = False
        self.has_started = False  # an earlier writer has written a `Started`

    @property
    def is_open(self) -> bool:
        return self._file is not None

    @property
    def last_seq(self) -> int:
        """The seq of the last event; 0 until the spool is open."""
        return len(self._ends) - 1

    def open(self) -> None:
        if self._file is not None:
            return
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            self._read(file)
        except BaseException:
            os.close(file)
            raise
        self._file = file

    def append(self, event: Event) -> None:
        """Writes the event under the next seq; it survives the death of this process, not of the machine."""
        line = Numbered(seq=self.last_seq + 1, time_s=time.time(), event=event).model_dump_json().encode() + b"\n"
        file = self._opened()
        if self._is_torn:
            os.ftruncate(file, self._ends[-1])
        self._is_torn = True
        written = 0
        while written < len(line):
            written += os.write(file, line[written:])
        self._is_torn = False
        self._ends.append(self._ends[-1] + len(line))

    def sync(self) -> None:
        """Makes the appended events survive the death of the machine too."""
        os.fsync(self._opened())

    def lines(self, after_seq: int, *, limit: int, limit_bytes: int) -> list[bytes]:
        """Returns the events after `after_seq` as JSON: at most `limit`, and `limit_bytes` unless one is longer."""
        last = min(after_seq + limit, self.last_seq)
        while last > after_seq + 1 and self._ends[last] - self._ends[after_seq] > limit_bytes:
            last -= 1
        start = self._ends[after_seq]
        return os.pread(self._opened(), self._ends[max(last, after_seq)] - start, start).splitlines()

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _read(self, file: int) -> None:
        self._ends, self._is_torn = [0], False
        with open(file, "rb", closefd=False) as lines:
            for line in lines:
                self._is_torn = not line.endswith(b"\n")
                if not self._is_torn:
                    self._ends.append(self._ends[-1] + len(line))
                    self.has_started = self.has_started or STARTED in line[:STARTED_WITHIN]

    def _opened(self) -> int:
        self.open()
        assert self._file is not None
        return self._file
