"""Makes chosen file operations below a folder fail, as a full disk, a broken one or a lost file does."""

import errno
import io
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

__all__ = ["ERRORS", "OPERATIONS", "Faults"]

OPERATIONS = {
    "open": (io, "open"),  # pathlib's
    "os.open": (os, "open"),  # the spool's, tempfile's
    "write": (os, "write"),
    "truncate": (os, "ftruncate"),
    "pread": (os, "pread"),
    "fsync": (os, "fsync"),
    "stat": (os, "stat"),
    "mkdir": (os, "mkdir"),
    "listdir": (os, "listdir"),
    "rename": (os, "rename"),
    "replace": (os, "replace"),
}
ERRORS = {"full": errno.ENOSPC, "broken": errno.EIO, "missing": errno.ENOENT}


class Faults:
    """Counts what is done below the folder; the next `times` calls of an operation fail."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counted = Counter[str]()
        self._folder = str(folder)
        self._left = Counter[str]()
        self._error = 0
        for operation, (module, name) in OPERATIONS.items():
            monkeypatch.setattr(module, name, self._wrapped(operation, getattr(module, name)))

    def fail(self, operation: str, error: int, times: int) -> None:
        self._error = error
        self._left[operation] = times

    def stop(self) -> None:
        self._left.clear()

    def _wrapped(self, operation: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(target: Any, *arguments: Any, **named: Any) -> Any:
            path = _path_of(target)
            if path.startswith(self._folder):
                self.counted[operation] += 1
                if self._left[operation] > 0:
                    self._left[operation] -= 1
                    raise OSError(self._error, os.strerror(self._error), path)
            return call(target, *arguments, **named)

        return wrapped


def _path_of(target: Any) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fsdecode(target)
    except (OSError, TypeError):
        return ""
