"""The contract of a dispatcher: it starts attempts, says how they are, and stops them. It knows nothing of phases."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from service.job_state import Process
from workers.events import Numbered
from workers.rundir import Outcome

__all__ = ["AttemptRef", "DispatchError", "Dispatcher", "Launch", "Seen"]


class DispatchError(Exception):
    """An attempt can't be started here; str() is one sentence for the job's owner."""


@dataclass(frozen=True, slots=True)
class AttemptRef:
    """Names an attempt, whether or not it was ever started."""

    job_id: str
    number: int

    @property
    def attempt_id(self) -> str:
        return f"{self.job_id}-a{self.number}"


@dataclass(frozen=True, slots=True)
class Launch:
    """All that an attempt needs to start."""

    ref: AttemptRef
    spec: Mapping[str, Any]
    token: str


@dataclass(frozen=True, slots=True)
class Seen:
    """How an attempt is; its outcome, once written, is the truth of how it ended."""

    process: Process
    outcome: Outcome | None = None


class Dispatcher(Protocol):
    def submit(self, launch: Launch) -> None:
        """Starts the attempt unless it was started before: calling it again changes nothing. Raises: DispatchError."""
        ...

    def inspect(self, ref: AttemptRef) -> Seen: ...

    def interrupt(self, ref: AttemptRef) -> None:
        """Asks the driver to stop in order; nothing happens if it has ended."""
        ...

    def kill(self, ref: AttemptRef) -> None:
        """Ends every process of the attempt, also those that a dead driver has left behind."""
        ...

    def undelivered(self, ref: AttemptRef, after_seq: int) -> Iterator[list[Numbered]]:
        """Yields the attempt's own record of its events after `after_seq`, in batches."""
        ...

    def read_log(self, ref: AttemptRef, offset: int, limit: int) -> bytes:
        """Returns up to `limit` bytes of the log from `offset`; b"" at its end."""
        ...

    def tail_log(self, ref: AttemptRef, lines: int | None) -> tuple[bytes, int]:
        """Returns the log's last lines (None: all that is served at once) and the offset after them."""
        ...
