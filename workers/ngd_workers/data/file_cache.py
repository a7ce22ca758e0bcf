"""Keeps files from afar in a folder, up to a number of bytes; several processes share it.

Each file is `<key>-<bytes>`; while it is fetched, `<key>-<bytes>.partial`. So its name says how much room it takes
before its first byte has come. A process that fetches holds a lock on its partial file, by which the file of a dead
process is known. The lock of the folder guards the sum of all sizes.
"""

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ngd_workers.contract.errors import SpecError, StorageError, WorkerError

__all__ = ["FileCache"]

NAME = re.compile(r"[0-9a-f]{32}-(?P<size>\d+)(?P<partial>\.partial)?")
LOCK_NAME = "lock"
AGAIN_S = 0.05


class FileCache:
    """Files in a folder that may take `most_bytes` together; those read longest ago go first."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._folder, self._most_bytes = folder, most_bytes

    def read_range(self, source: str, size: int, begin: int, length: int, fetch: Callable[[Path], None]) -> bytes:
        """Returns a range of the file that `source` names, of `size` bytes; `fetch` writes a file that is not here.

        Raises: SpecError if it is larger than the cache, StorageError, and what `fetch` raises.
        """
        if size > self._most_bytes:
            raise SpecError(f"data.cache.bytes must be at least the largest shard's, {size}, got {self._most_bytes}")
        path = self._folder / f"{hashlib.sha256(source.encode()).hexdigest()[:32]}-{size}"
        try:
            descriptor = self._opened(path)
            while descriptor is None:
                descriptor = self._fetched(path, size, fetch)
            try:
                os.utime(descriptor)  # it is now the one read last
                return os.pread(descriptor, length, begin)
            finally:
                os.close(descriptor)
        except WorkerError:
            raise
        except OSError as error:
            raise StorageError(f"can't use data.cache.directory {self._folder}: {error}; check the disk") from error

    def _opened(self, path: Path) -> int | None:
        try:
            return os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None

    def _fetched(self, path: Path, size: int, fetch: Callable[[Path], None]) -> int | None:
        """Returns a descriptor of the file; None: ask again, since another process fetches it or holds all the room."""
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with self._locked():
            if (there := self._opened(path)) is not None:
                return there
            descriptor = self._reserved(partial, size)
        if descriptor is None:
            time.sleep(AGAIN_S)
            return None
        try:
            fetch(partial)
            with self._locked():
                os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        return descriptor  # of the file itself: another process may remove its name before it is read

    def _reserved(self, partial: Path, size: int) -> int | None:
        """Returns a locked descriptor of the new partial file, with room for it; None if there is none yet."""
        whole: list[tuple[int, int, str]] = []
        used = 0
        for entry in list(os.scandir(self._folder)):
            name = NAME.fullmatch(entry.name)
            if name is None:
                continue  # not ours
            if name["partial"] and not _is_at_work(entry.path):
                os.unlink(entry.path)
                continue
            if entry.path == str(partial):
                return None
            used += int(name["size"])
            if not name["partial"]:
                whole.append((entry.stat().st_mtime_ns, int(name["size"]), entry.path))
        for _, old_size, old in sorted(whole):
            if used + size > self._most_bytes:
                os.unlink(old)
                used -= old_size
        if used + size > self._most_bytes:
            return None
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return descriptor

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self._folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _is_at_work(partial: str) -> bool:
    """Returns whether a living process holds the lock of the partial file."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
