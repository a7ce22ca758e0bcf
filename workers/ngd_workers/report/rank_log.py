"""Copies the output of one rank to a separate file, beside the log in which the lines of all ranks are mixed."""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

__all__ = ["kept_in"]


class _File(io.TextIOBase):
    """Appends text as it comes. If the disk is full, the text is lost and training goes on."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            os.write(self._descriptor, text.encode(errors="replace"))
        return len(text)


class _Both(io.TextIOBase):
    """Writes the same text to a stream and to a file."""

    def __init__(self, stream: TextIO, file: _File) -> None:
        self._stream = stream
        self._file = file

    def write(self, text: str) -> int:
        self._file.write(text)
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return False


@contextlib.contextmanager
def kept_in(path: Path) -> Iterator[None]:
    """Copies all that this process prints and logs into the file, except C code's output past Python's streams."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        logging.getLogger(__name__).warning("can't write %s: %s; the attempt's log has all", path, error.strerror)
        yield
        return
    file, root = _File(descriptor), logging.getLogger()
    handler = logging.StreamHandler(file)
    handler.setFormatter(root.handlers[0].formatter if root.handlers else None)
    root.addHandler(handler)  # existing handlers keep the stream that they were given
    try:
        with contextlib.redirect_stdout(_Both(sys.stdout, file)), contextlib.redirect_stderr(_Both(sys.stderr, file)):
            yield
    finally:
        root.removeHandler(handler)
        os.close(descriptor)
