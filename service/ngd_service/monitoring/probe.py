"""Asks a question that may hang, without hanging with it."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

__all__ = ["Probe"]

Answer = TypeVar("Answer")


class Probe(Generic[Answer]):
    """Asks in a thread of its own, one question at a time, and keeps an answer for fresh_s.

    However many callers wait, and however long the answer takes, no more than this one thread waits with them: what
    has a pool of threads (the API's routes) keeps it for itself.
    """

    def __init__(self, ask: Callable[[], Answer], *, fresh_s: float = 1.0) -> None:
        self._ask = ask
        self._fresh_s = fresh_s
        self._asking: Future[Answer] | None = None
        self._asked_at = 0.0

    async def answer(self, *, within_s: float) -> Answer:
        """Returns the answer. Raises: TimeoutError, or the question's own error. All callers are on one event loop."""
        if self._asking is None or (self._asking.done() and time.monotonic() - self._asked_at > self._fresh_s):
            self._asking, self._asked_at = Future(), time.monotonic()
            threading.Thread(target=self._run, args=[self._asking], name="probe", daemon=True).start()
        waiting = asyncio.wrap_future(self._asking)
        return await asyncio.wait_for(asyncio.shield(waiting), within_s)

    @property
    def waited_s(self) -> float:
        """Seconds since the question was asked that has no answer yet; 0: none is open."""
        is_open = self._asking is not None and not self._asking.done()
        return time.monotonic() - self._asked_at if is_open else 0.0

    def _run(self, asking: Future[Answer]) -> None:
        try:
            asking.set_result(self._ask())
        except Exception as error:  # noqa: BLE001  the waiting caller gets it
            asking.set_exception(error)
