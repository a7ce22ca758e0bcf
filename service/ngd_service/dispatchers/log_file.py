"""A log as it is read: from any byte, to its newest lines, and never more of it on disk than was allowed.

A log that has grown too long loses its oldest part where it lies: the file system takes the blocks back and every later
byte keeps its offset, so that neither its writer nor its readers need to know.
"""

import ctypes
import errno
import os
from dataclasses import dataclass, replace
from pathlib import Path

__all__ = ["LogFile", "LogPart", "as_read"]

TAIL_BYTES = 1 << 20  # the most of a log that is read at once
PUNCH_HOLE, KEEP_SIZE = 0x02, 0x01  # fallocate(2)
BLOCK = 4096
CUT = b"[ngd: what stood here was dropped: the log took more than %d bytes]\n"
UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV})


@dataclass(frozen=True, slots=True)
class LogPart:
    """Whole lines of a log. start, end: its place; left_out: bytes before it that were not asked to be left out."""

    text: bytes
    start: int
    end: int
    left_out: int = 0


class LogFile:
    """One file of a log, which may be absent yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def size(self) -> int:
        """Bytes that were ever written, whether or not they are still kept."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    @property
    def begin(self) -> int:
        """Offset of the first byte that is kept."""
        try:
            with self.path.open("rb") as file:
                return os.lseek(file.fileno(), 0, os.SEEK_DATA)
        except FileNotFoundError:
            return 0
        except OSError as error:
            return self.size if error.errno == errno.ENXIO else 0  # nothing but a hole; or holes are not known here

    def read(self, offset: int, limit: int) -> bytes:
        """Returns up to `limit` bytes from `offset`; b"" at its end."""
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                return file.read(limit)
        except FileNotFoundError:
            return b""

    def tail(self, lines: int | None = None) -> LogPart:
        """Returns the last lines; None: as many as are read at once."""
        start = max(self.begin, self.size - TAIL_BYTES)
        part = self._lines(start, is_cut=start > 0)
        if lines is None:
            return replace(part, left_out=part.start)
        kept = b"".join(part.text.splitlines(keepends=True)[-lines:]) if lines else b""
        return LogPart(kept, part.end - len(kept), part.end)

    def part(self, offset: int) -> LogPart:
        """Returns the bytes after the offset: up to TAIL_BYTES, and up to the end of a line.

        An offset behind the end is one of a log that was cut to nothing since, and counts as its beginning.
        """
        begin = self.begin
        if begin <= offset <= self.size:
            return self._lines(offset, is_cut=False)
        part = self._lines(begin, is_cut=begin > 0)
        return replace(part, left_out=part.start)

    def _lines(self, start: int, *, is_cut: bool) -> LogPart:
        """is_cut: whether the first line may lack its beginning, and then is left out."""
        text = self.read(start, TAIL_BYTES)
        if len(text) == TAIL_BYTES and start + TAIL_BYTES < self.size:
            text = text[: text.rfind(b"\n") + 1] or text
        if is_cut and self.read(start - 1, 1) != b"\n":
            cut = text.find(b"\n") + 1
            text, start = text[cut:], start + cut
        return LogPart(text, start, start + len(text))

    def keep(self, max_bytes: int) -> None:
        """Gives the oldest part's blocks back when the file takes more of the disk. Raises: OSError."""
        if not self.path.exists() or self.path.stat().st_blocks * 512 <= max_bytes:
            return
        with self.path.open("r+b") as file:
            end = (self.size - max_bytes // 2) // BLOCK * BLOCK
            try:
                _punch(file.fileno(), end)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                os.ftruncate(file.fileno(), 0)  # its writers append, and go on at the new end
                with self.path.open("ab") as end_of_file:
                    end_of_file.write(CUT % max_bytes)


def as_read(text: bytes) -> bytes:
    """Returns the lines as a terminal would have left them: a progress bar draws over itself after each "\\r"."""
    return b"\n".join(line.rstrip(b"\r").rpartition(b"\r")[2] for line in text.split(b"\n"))


def _punch(descriptor: int, end: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "fallocate"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    length = ctypes.c_int64(end)
    if libc.fallocate(descriptor, PUNCH_HOLE | KEEP_SIZE, ctypes.c_int64(0), length) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
