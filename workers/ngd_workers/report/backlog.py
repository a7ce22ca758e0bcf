"""Events that wait to be written: a bounded queue that reports the steps for which it had no room."""

import threading
from collections import deque

from ngd_workers.contract.events import Evaluation, Event, StepRecord, StepsLost

__all__ = ["Backlog"]

MAX_STEPS = 4096  # some 20 MB with the ages and intervals of 160 statistics
MAX_EVENTS = MAX_STEPS + 1024  # rarer events still find room when steps find none


class Backlog:
    """First in, first out; safe to share between threads. An event that finds no room is dropped.

    When there is room again, a `StepsLost` comes first, so that the hole is reported at its place.
    """

    def __init__(self) -> None:
        self._events: deque[Event | StepRecord] = deque()
        self._num_dropped = 0
        self._dropped_steps: list[int] = []  # the first and the last
        self._trouble = "they came faster than they could be written"
        self._lock = threading.Lock()

    @property
    def is_empty(self) -> bool:
        with self._lock:
            return not self._events and not self._num_dropped

    def note_trouble(self, cause: str) -> None:
        self._trouble = cause

    def put(self, event: Event | StepRecord) -> None:
        with self._lock:
            if len(self._events) >= (MAX_STEPS if isinstance(event, StepRecord) else MAX_EVENTS):
                self._drop(event)
                return
            self._tell_of_dropped()
            self._events.append(event)

    def put_first(self, event: Event) -> None:
        with self._lock:
            self._events.appendleft(event)

    def first(self) -> Event | StepRecord | None:
        with self._lock:
            if not self._events:
                self._tell_of_dropped()
            return self._events[0] if self._events else None

    def remove_first(self) -> None:
        with self._lock:
            self._events.popleft()

    def _drop(self, event: Event | StepRecord) -> None:
        if isinstance(event, StepRecord | Evaluation):
            self._dropped_steps.append(event.step)
            self._dropped_steps = [min(self._dropped_steps), max(self._dropped_steps)]
        self._num_dropped += 1

    def _tell_of_dropped(self) -> None:
        if not self._num_dropped:
            return
        first, last = self._dropped_steps or [0, 0]
        message = f"{self._num_dropped} events could not be kept while none could be written ({self._trouble})"
        self._events.append(StepsLost(first_step=first, last_step=last, message=message))
        self._dropped_steps, self._num_dropped = [], 0
