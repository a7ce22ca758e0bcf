"""An attempt's events on disk, one Numbered event a line. A line's number is its seq, so seq has no gaps."""

import time
from pathlib import Path
from typing import BinaryIO

from workers.events import Event, Numbered

__all__ = ["Spool"]


class Spool:
    """Append-only file of events with one writer at a time. Opening cuts off a torn last line, left by a crash."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("a+b")
        self._ends = self._cut_torn_line()

    @property
    def last_seq(self) -> int:
        return len(self._ends) - 1

    def append(self, event: Event) -> None:
        """Writes the event under the next seq; it survives the death of this process, not of the machine."""
        line = Numbered(seq=self.last_seq + 1, time_s=time.time(), event=event).model_dump_json().encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        self._ends.append(self._ends[-1] + len(line))

    def lines(self, after_seq: int, *, limit: int, limit_bytes: int) -> list[bytes]:
        """Returns the events after `after_seq` as JSON: at most `limit`, and `limit_bytes` unless one is longer."""
        last = min(after_seq + limit, self.last_seq)
        while last > after_seq + 1 and self._ends[last] - self._ends[after_seq] > limit_bytes:
            last -= 1
        self._file.seek(self._ends[after_seq])
        return self._file.read(self._ends[max(last, after_seq)] - self._ends[after_seq]).splitlines()

    def close(self) -> None:
        self._file.close()

    def _cut_torn_line(self) -> list[int]:
        self._file.seek(0)
        ends = [0]
        for line in self._file:
            if line.endswith(b"\n"):
                ends.append(ends[-1] + len(line))
        self._file.truncate(ends[-1])
        return ends
