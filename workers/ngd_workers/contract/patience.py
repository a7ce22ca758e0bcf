"""Repeats file operations if the cause may pass: a full disk, a stale handle, a file not in sight yet."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from ngd_workers.contract.errors import StorageError, WorkerError

__all__ = ["insist"]

Value = TypeVar("Value")

log = logging.getLogger(__name__)

AGAIN_S = 0.5


def insist(call: Callable[[], Value], action: str, *, patience_s: float) -> Value:
    """Returns the result of `call`, repeated while it raises an OSError. Raises: StorageError after `patience_s`."""
    began_s = time.monotonic()
    is_told = False
    while True:
        try:
            return call()
        except WorkerError:
            raise  # one that knows its cause does not pass
        except OSError as error:
            if time.monotonic() - began_s >= patience_s:
                raise StorageError(f"can't {action}, tried for {patience_s:g} s: {error}; check the volume") from error
            if not is_told:
                log.warning("can't %s: %s; trying again for %g s", action, error, patience_s)
                is_told = True
        time.sleep(AGAIN_S)
