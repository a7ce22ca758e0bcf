"""The folder of an installation: one service at a time looks after it, and a start that failed leaves it as it was."""

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from ngd_service.errors import StartupError

__all__ = ["DATABASE", "KEY", "RUNS", "owned"]

LOCK, KEY, RUNS, DATABASE = "controller.lock", "key", "runs", "ngd.sqlite"
NAMES = (LOCK, KEY, RUNS, DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm")


@contextmanager
def owned(home: Path) -> Iterator[None]:
    """Makes the folder and holds its lock: two controllers with one folder would both look after its processes.

    Raises: StartupError. One that is raised while the lock is held takes away what the start had made here.
    """
    try:
        missing = [path for path in (*(home / name for name in NAMES), home, *home.parents) if not path.exists()]
        home.mkdir(parents=True, exist_ok=True)
        _keep_to_this_user(home)
        lock = (home / LOCK).open("a")
    except OSError as error:
        raise StartupError(f"can't use the folder {home}: {error.strerror}; set NGD_HOME") from error
    with lock:
        if not _is_held(lock, home / LOCK):
            raise StartupError(
                f"another service uses the folder {home}; stop it, or give this one its own with NGD_HOME"
            )
        try:
            yield
        except StartupError:
            _remove(missing)
            raise


def _keep_to_this_user(home: Path) -> None:
    """Closes a folder of an earlier version to others; a mounted one, or one that all may write to, stays as it is."""
    for path in (home, *(home / name for name in NAMES)):
        if path.exists() and path.stat().st_uid == os.geteuid() and not path.stat().st_mode & stat.S_ISVTX:
            path.chmod(0o700 if path.is_dir() else 0o600)


def _is_held(lock: TextIO, path: Path) -> bool:
    """Returns whether the lock is now this process's; another start that failed may have taken its file away."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _remove(made: list[Path]) -> None:
    """Removes files and empty folders, the innermost first; folders with other things in them stay."""
    for path in made:
        with contextlib.suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink()
