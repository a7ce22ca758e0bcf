"""How long a dispatcher has been unresponsive, counting only time in which the controller was watching.

While a controller is suspended or its database is away it observes nothing, so wall-clock time would count too much.
"""

import time
from collections.abc import Callable

from ngd_service.dispatchers.base import AttemptRef

__all__ = ["Silence"]

LONGEST_GAP_S = 60.0  # between two failed calls that count as one silence


class Silence:
    """Per attempt, as seen by this controller; others may have heard of it since (AttemptState.last_seen_at)."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._of: dict[AttemptRef, tuple[float, float]] = {}  # seconds of silence, and when the last call failed

    def failed(self, ref: AttemptRef) -> float:
        """Returns the seconds of silence up to this failed call; the first has none."""
        now_s = self._clock_s()
        silent_s, at_s = self._of.get(ref, (0.0, now_s))
        silent_s += min(now_s - at_s, LONGEST_GAP_S)
        self._of[ref] = silent_s, now_s
        return silent_s

    def is_over(self, ref: AttemptRef) -> bool:
        """Ends the attempt's silence. Returns whether there was one."""
        return self._of.pop(ref, None) is not None
