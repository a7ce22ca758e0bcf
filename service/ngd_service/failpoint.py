"""Places where a test kills the controller by SIGKILL; without the setting nothing happens."""

import os
import signal
from typing import Literal

__all__ = ["Failpoint", "Place"]

Place = Literal["after_attempt_commit", "after_spawn", "after_submit"]


class Failpoint:
    """Kills this process when it reaches the armed place. armed: None kills nowhere."""

    def __init__(self, armed: Place | None) -> None:
        self._armed = armed

    def reach(self, place: Place) -> None:
        if place == self._armed:
            os.kill(os.getpid(), signal.SIGKILL)
