"""The contract of a dispatcher: it starts attempts, says how they are, and stops them. It knows nothing of phases.

The files that an attempt reads and writes are the same for every dispatcher; files.py knows them.
"""

import hashlib
import json
import signal
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Self, TypeVar

from pydantic import BaseModel

from ngd_service.failpoint import Failpoint
from ngd_service.job_state import Process
from ngd_workers.contract.rundir import Outcome

if TYPE_CHECKING:
    from ngd_service.dispatchers.files import AttemptFiles

__all__ = [
    "JOB_ID",
    "SPEC_SHA256",
    "AttemptRef",
    "BackendError",
    "BackendFullError",
    "BackendRefusedError",
    "BackendUnavailableError",
    "DispatchError",
    "Dispatcher",
    "Launch",
    "NoSettings",
    "Seen",
    "exit_words",
]

JOB_ID, SPEC_SHA256 = "ngd.dev/job-id", "ngd.dev/spec-sha256"  # the names under which Ray and KubeRay keep them


class DispatchError(Exception):
    """An attempt can't be started here; str() is one sentence for the job's owner."""


class BackendError(Exception):
    """The dispatcher's cluster or machine did not carry out a call; the call is made again. str(): one sentence."""


class BackendUnavailableError(BackendError):
    """It does not answer, or refuses this service: nothing is known of any attempt, so str() names none.

    One call that fails so speaks for all jobs of a tick; each of them tells its owner this sentence.
    """


class BackendRefusedError(BackendError):
    """It answers and refused this call; other attempts may not be affected."""


class BackendFullError(BackendRefusedError):
    """It has no room for the attempt now, for example because a quota is full: no failure, the call is made again."""


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

    @property
    def spec_sha256(self) -> str:
        """Identifies the attempt: a job of the same name with another hash belongs to something else."""
        return hashlib.sha256(json.dumps(self.spec, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Seen:
    """The state of an attempt; once its outcome is written, the outcome alone says how it ended."""

    process: Process
    outcome: Outcome | None = None
    message: str | None = None  # for the job's owner: the reason for waiting, or for the end


def exit_words(status: int) -> str:
    """Returns how a process ended. status: as Python gives it, negative for a signal, or a shell, 128 + its number."""
    number = -status if status < 0 else status - 128
    try:
        return f"was ended by {signal.Signals(number).name}"
    except ValueError:
        return f"ended with exit status {status}"


class NoSettings(BaseModel):
    """The settings of a dispatcher that has none."""


OwnSettings = TypeVar("OwnSettings", bound=BaseModel)


class Dispatcher(ABC, Generic[OwnSettings]):
    """Starts attempts and stops them. Every call may raise BackendError, and may be made again."""

    settings_class: ClassVar[type[BaseModel]] = NoSettings
    """Its settings; each has a default, is read from NGD_<NAME>, and is refused while another dispatcher is chosen."""

    owns_processes: ClassVar[bool] = False
    """Whether attempts are processes of this machine. They belong to one home then, with its runs and its database."""

    ray: ClassVar[Literal["own", "given"]] = "given"
    """Whether a driver starts a Ray of its own or finds one where it runs."""

    takes_images: ClassVar[bool] = False
    """Whether an attempt runs in the image that its spec names, if it names one."""

    @classmethod
    def check(cls, settings: OwnSettings) -> None:
        """Raises: ValueError with one sentence if a setting that this dispatcher needs is missing."""

    @classmethod
    @abstractmethod
    def of(cls, settings: OwnSettings, files: "AttemptFiles", *, command: Sequence[str], failpoint: Failpoint) -> Self:
        """Returns the dispatcher; it runs `command ATTEMPT_DIR`. Raises: StartupError with one sentence."""

    @abstractmethod
    def submit(self, launch: Launch) -> None:
        """Starts the attempt unless it was started before: calling it again changes nothing. Raises: DispatchError."""

    @abstractmethod
    def inspect(self, ref: AttemptRef) -> Seen:
        """Returns whether the attempt runs, and its outcome once it has ended."""

    @abstractmethod
    def interrupt(self, ref: AttemptRef) -> None:
        """Asks the driver to stop in order; nothing happens if it has ended."""

    @abstractmethod
    def kill(self, ref: AttemptRef) -> None:
        """Ends every process of the attempt, also those that a dead driver has left behind.

        On this machine it returns when they are gone; elsewhere inspect tells when.
        """
