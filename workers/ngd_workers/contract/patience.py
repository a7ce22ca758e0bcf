"""File operations that are worth another try: a full disk, a stale handle or a file not in sight yet passes."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from ngd_workers.contract.errors import StorageError

__all__ = ["insist"]

Value = TypeVar("Value")

log = logging.getLogger(__name__)

AGAIN_S = 0.5


def insist(call: Callable[[], Value], what: str, *, patience_s: float) -> Value:
    """Returns what `call` returns; while it raises an OSError it is called again. Raises: StorageError after that."""
    began_s = time.monotonic()
    is_told = False
    while True:
        try:
            return call()
        except OSError as error:
            if time.monotonic() - began_s >= patience_s:
                raise StorageError(f"can't {what}, tried for {patience_s:g} s: {error}; check the volume") from error
            if not is_told:
                log.warning("can't %s: %s; tried again for %g s", what, error, patience_s)
                is_told = True
        time.sleep(AGAIN_S)
