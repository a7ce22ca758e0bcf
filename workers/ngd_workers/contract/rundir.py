"""The places of a job's files on disk, and how they are read and written. Imports without torch.

    RUN_DIR/                     one job; shared by all of its attempts
        checkpoints/             a later attempt resumes from the newest
        attempts/<n>/            ATTEMPT_DIR: one attempt
            spec.json            the job's spec, written before the driver starts
            attempt.json         Facts (mode 0600): the attempt's identity and the service's address
            code/                the user's own code, unpacked by the driver
            process.json         pid and start time of the driver, written by the dispatcher
            started              a driver has begun; written on a given cluster, which may start a second driver
            stop                 asks the attempt to end in order; its text names the signal, if a signal asked
            resize               asks the workers to end in order, to start again in another number; its text says why
            nodes/<g>/<id>       each node of Ray that holds a worker of the attempt's g-th group of workers
            ended                the fence: the service has ended the attempt, which may commit no more checkpoints
            events.jsonl         the reporter's spool: one Numbered event a line
            fault.json           Outcome of a rank that failed for good: the workers that start again end with it
            outcome.json         Outcome of the attempt; the driver writes it once, as its last act
            log.txt              stdout and stderr of the driver and its workers
            log-rank-<r>.txt     output of rank r alone

The driver is ``python -m ngd_workers.launch ATTEMPT_DIR``. A restarted service may listen on another
port, and then replaces attempt.json: read that file again after a connection has failed.
"""

import contextlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ngd_workers.contract.events import with_metrics
from ngd_workers.contract.spec import AnySpec, spec_of_json

__all__ = ["EXIT_STATUS", "NOT_THE_FIRST", "AttemptDir", "Facts", "Outcome", "read_json", "write_json"]

Model = TypeVar("Model", bound=BaseModel)


class Facts(BaseModel):
    """attempt.json: the facts that the driver needs besides the spec."""

    model_config = ConfigDict(frozen=True)

    attempt_id: str
    attempt: int = Field(ge=1, description="Number of this attempt within its job; later attempts fence earlier ones.")
    job_id: str
    url: str | None = Field(description="Base URL of the service; None: the attempt runs without one.")
    token: str | None = Field(description="Bearer token of this attempt alone.")
    run_dir: Path = Field(description="Absolute; holds checkpoints/.")
    data_dir: Path | None = Field(description="Absolute; a relative data directory in the spec is below it.")
    cluster: Literal["own", "given"] = Field(
        default="own",
        description="own: the driver starts Ray on its machine; given: the driver uses the Ray cluster that runs it.",
    )
    code: Path | None = Field(
        default=None, description="Absolute; the archive of the job's own code, or a folder that is used as it is."
    )
    secrets_dir: Path | None = Field(default=None, description="Absolute; a file for each secret that jobs may name.")


class Outcome(BaseModel):
    """outcome.json: the end of an attempt; it counts, not the status of the process."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    result: Literal["succeeded", "failed", "cancelled", "resized"] = Field(
        description="resized: the workers have ended to start again in another number. The driver goes on then, and "
        "never writes it."
    )
    reason: str | None = Field(
        default=None, description="CamelCase word for machines, if the attempt failed or a signal stopped it."
    )
    message: str | None = Field(
        default=None, description="One sentence for a person, if the attempt failed or a signal stopped it."
    )
    retryable: bool = Field(default=False, description="Whether another attempt could end differently.")
    step: int = 0
    metrics: dict[str, float] = Field(default={}, description="Of the test data, after the last step.")
    target_step: int | None = None
    seconds: float | None = Field(default=None, description="Wall time of training, without start-up.")

    @model_validator(mode="before")
    @classmethod
    def _with_metrics(cls, given: object) -> object:
        return with_metrics(given)


EXIT_STATUS = {"succeeded": 0, "failed": 1, "cancelled": 3}  # of a driver that has written its outcome
NOT_THE_FIRST = 4  # exit status of a driver if another driver has begun the attempt


@dataclass(frozen=True, slots=True)
class AttemptDir:
    """Names of the files of one attempt."""

    path: Path

    @classmethod
    def of(cls, run_dir: Path, attempt: int) -> "AttemptDir":
        return cls(run_dir / "attempts" / str(attempt))

    @property
    def spec(self) -> Path:
        return self.path / "spec.json"

    @property
    def facts(self) -> Path:
        return self.path / "attempt.json"

    @property
    def code(self) -> Path:
        return self.path / "code"

    @property
    def process(self) -> Path:
        return self.path / "process.json"

    @property
    def spool(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def started(self) -> Path:
        return self.path / "started"

    @property
    def stop(self) -> Path:
        return self.path / "stop"

    @property
    def resize(self) -> Path:
        return self.path / "resize"

    def nodes(self, group: int) -> Path:
        return self.path / "nodes" / str(group)

    @property
    def ended(self) -> Path:
        return self.path / "ended"

    @property
    def fault(self) -> Path:
        return self.path / "fault.json"

    @property
    def outcome(self) -> Path:
        return self.path / "outcome.json"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    def rank_log(self, rank: int) -> Path:
        return self.path / f"log-rank-{rank}.txt"

    def logs(self) -> list[Path]:
        """Returns all existing logs, of the driver and of the ranks."""
        return list(self.path.glob("log*.txt"))

    def claim(self) -> bool:
        """Returns whether this driver is the attempt's first: True for one driver alone, even across machines."""
        try:
            self.started.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def read_spec(self) -> AnySpec:
        """Returns the job's spec. Raises: FileNotFoundError, pydantic.ValidationError."""
        return spec_of_json(self.spec.read_bytes())

    def read_facts(self) -> Facts:
        """Returns attempt.json. Raises: FileNotFoundError, pydantic.ValidationError."""
        return Facts.model_validate_json(self.facts.read_bytes())

    def read_outcome(self) -> Outcome | None:
        """Returns the attempt's outcome; None while it has not ended."""
        return read_json(self.outcome, Outcome)


def read_json(path: Path, model: type[Model]) -> Model | None:
    """Returns the file as `model`, None if there is no such file. Raises: pydantic.ValidationError."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    return model.model_validate_json(text)


def write_json(path: Path, value: BaseModel) -> None:
    """Replaces the file in one step, mode 0600: a reader, and a crash, see the old content or the new, never half."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(value.model_dump_json(indent=2))
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
