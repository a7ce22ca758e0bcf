"""Attempts as jobs of a Ray cluster, through the REST API of its dashboard; the controller needs no Ray for that.

The attempt's id is Ray's submission id, which Ray gives away once: an answer that got lost is asked for again. The
driver runs on the cluster, on a volume of runs that the controller shares; see files.py.
"""

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

import httpx
from pydantic import BaseModel, Field, ValidationError

from ngd_service.dispatchers.base import (
    JOB_ID,
    SPEC_SHA256,
    AttemptRef,
    BackendRefusedError,
    BackendUnavailableError,
    Dispatcher,
    DispatchError,
    Launch,
    Seen,
    exit_words,
)
from ngd_service.dispatchers.files import AttemptFiles, age_s, entrypoint
from ngd_service.errors import StartupError
from ngd_service.failpoint import Failpoint
from ngd_service.job_state import Process
from ngd_service.setting_types import OptionalPath, Origin
from ngd_workers.contract.rundir import EXIT_STATUS

__all__ = ["RayJobsDispatcher"]

log = logging.getLogger(__name__)

LINGER_S = 30.0  # for a driver that has written its outcome to leave by itself
TIMEOUT = httpx.Timeout(10.0, connect=5.0)


class RayJobsSettings(BaseModel):
    """Where the Ray cluster is."""

    ray_address: Origin = Field("", description="ray_jobs: where Ray's dashboard answers, http://head:8265.")
    ray_token_file: OptionalPath = Field(None, description="ray_jobs: file with the Ray cluster's token.")


class RayJob(BaseModel):
    """What is read of Ray's answer about a job."""

    status: Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]
    message: str | None = None
    end_time: int | None = None  # milliseconds
    driver_exit_code: int | None = None
    metadata: dict[str, str] | None = None

    @property
    def ended_at(self) -> datetime | None:
        return None if self.end_time is None else datetime.fromtimestamp(self.end_time / 1000, UTC)

    @property
    def ended_how(self) -> str | None:
        if self.driver_exit_code is not None:
            return f"the driver {exit_words(self.driver_exit_code)}"
        return _first_line(self.message)


class RayJobsDispatcher(Dispatcher[RayJobsSettings]):
    """Submits `command ATTEMPT_DIR` to the Ray cluster at address."""

    settings_class = RayJobsSettings

    def __init__(
        self,
        files: AttemptFiles,
        *,
        address: str,
        token_file: Path | None,
        command: Sequence[str],
        failpoint: Failpoint,
    ) -> None:
        self._files = files
        self._address = address.rstrip("/")
        self._token_file = token_file
        self._command = tuple(command)
        self._failpoint = failpoint
        # The cluster is a neighbour, which no proxy of the environment leads to.
        self._http = httpx.Client(base_url=self._address, timeout=TIMEOUT, trust_env=False)

    @classmethod
    def check(cls, settings: RayJobsSettings) -> None:
        if not settings.ray_address:
            raise ValueError(
                "the dispatcher ray_jobs needs ray_address (NGD_RAY_ADDRESS), the address of Ray's dashboard such as "
                "http://127.0.0.1:8265"
            )

    @classmethod
    def of(
        cls, settings: RayJobsSettings, files: AttemptFiles, *, command: Sequence[str], failpoint: Failpoint
    ) -> Self:
        """Raises: StartupError if the token's file can't be read."""
        if settings.ray_token_file is not None:
            try:
                _token(settings.ray_token_file)
            except ValueError as error:
                raise StartupError(str(error)) from None
        return cls(
            files,
            address=settings.ray_address,
            token_file=settings.ray_token_file,
            command=command,
            failpoint=failpoint,
        )

    def close(self) -> None:
        self._http.close()

    def submit(self, launch: Launch) -> None:
        if self.inspect(launch.ref).process is Process.EXITED:
            return
        folder = self._files.prepare(launch)
        answer = self._call(
            "POST",
            "/api/jobs/",
            json={
                "submission_id": launch.ref.attempt_id,
                "entrypoint": entrypoint(self._command, folder),
                "metadata": {SPEC_SHA256: launch.spec_sha256, JOB_ID: launch.ref.job_id},
            },
        )
        self._failpoint.reach("after_spawn")
        if answer.status_code == httpx.codes.OK:
            return
        # Ray answers 500 for an id that is taken; only the job itself tells whether it is this attempt's.
        job = self._find(launch.ref)
        if job is None:
            if answer.status_code == httpx.codes.BAD_REQUEST:
                raise DispatchError(self._refusal("submit", answer))
            raise BackendRefusedError(self._refusal("submit", answer))
        if (job.metadata or {}).get(SPEC_SHA256) != launch.spec_sha256:
            raise DispatchError(
                f"the Ray cluster at {self._address} has another job with the id {launch.ref.attempt_id}; "
                "give each service a Ray cluster of its own, or delete that job"
            )

    def inspect(self, ref: AttemptRef) -> Seen:
        job = self._find(ref)
        outcome = self._files.outcome(ref)
        folder = self._files.folder(ref)
        if job is None:  # never submitted, or Ray's head was lost with all that it knew
            was_started = outcome is not None or folder.started.exists()
            return Seen(Process.EXITED if was_started else Process.UNKNOWN, outcome)
        if job.status in ("PENDING", "RUNNING") and outcome is not None and age_s(folder.outcome) > LINGER_S:
            log.warning("driver_lingers attempt=%s", ref.attempt_id)
            self.kill(ref)
            return Seen(Process.EXITED, outcome)
        if job.status in ("PENDING", "RUNNING"):
            self._files.announce(ref)
            waits = "waiting for the Ray cluster to start the driver" if job.status == "PENDING" else None
            return Seen(Process.RUNNING, message=waits)
        ended_by_itself = job.driver_exit_code in EXIT_STATUS.values()
        if outcome is None and ended_by_itself and self._files.may_still_show(job.ended_at):
            return Seen(Process.RUNNING, message="waiting for the outcome on the shared volume")
        return Seen(Process.EXITED, outcome, job.ended_how if outcome is None else None)

    def interrupt(self, ref: AttemptRef) -> None:
        self._files.ask_to_stop(ref)

    def kill(self, ref: AttemptRef) -> None:
        """Ray sends SIGTERM, three seconds later SIGKILL; the workers end with their driver."""
        self._files.ask_to_stop(ref)  # a submission whose answer was lost may be carried out after this
        job = self._find(ref)
        if job is None or job.status not in ("PENDING", "RUNNING"):
            return
        answer = self._call("POST", f"/api/jobs/{ref.attempt_id}/stop")
        if answer.status_code not in (httpx.codes.OK, httpx.codes.NOT_FOUND):
            raise BackendRefusedError(self._refusal("stop", answer))

    def _find(self, ref: AttemptRef) -> RayJob | None:
        answer = self._call("GET", f"/api/jobs/{ref.attempt_id}")
        if answer.status_code == httpx.codes.NOT_FOUND:
            return None
        if answer.status_code != httpx.codes.OK:
            # All jobs are told of it, and Ray's last line may hold this one's id.
            raise BackendUnavailableError(self._refusal("tell of", answer).replace(ref.attempt_id, "<id>"))
        try:
            return RayJob.model_validate_json(answer.content)
        except ValidationError as error:
            raise BackendUnavailableError(
                f"what answers at {self._address} is not Ray's dashboard; set NGD_RAY_ADDRESS to it, as in "
                "http://<head>:8265"
            ) from error

    def _call(self, method: str, path: str, json: Any = None) -> httpx.Response:
        try:
            answer = self._http.request(method, path, json=json, headers=self._headers())
        except httpx.RequestError as error:
            raise BackendUnavailableError(
                f"the Ray cluster at {self._address} does not answer ({str(error) or type(error).__name__})"
            ) from error
        if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise BackendUnavailableError(
                f"the Ray cluster at {self._address} refuses the token of NGD_RAY_TOKEN_FILE "
                f"({self._token_file or 'not set'}); give the one that its head was started with"
            )
        return answer

    def _headers(self) -> dict[str, str]:
        if self._token_file is None:
            return {}
        try:
            return {"Authorization": f"Bearer {_token(self._token_file)}"}  # each time: a secret may be replaced
        except ValueError as error:
            raise BackendUnavailableError(str(error)) from None

    def _refusal(self, verb: str, answer: httpx.Response) -> str:
        lines = answer.text.strip().splitlines()  # Ray answers with its traceback; the last line names the error
        return (
            f"the Ray cluster at {self._address} could not {verb} the job (HTTP {answer.status_code}"
            + (f": {lines[-1][:300]}" if lines else "")
            + ")"
        )


def _token(path: Path) -> str:
    """Returns the token in the file. Raises: ValueError that does not quote it."""
    try:
        token = path.read_bytes().strip()
    except OSError as error:
        raise ValueError(
            f"can't read NGD_RAY_TOKEN_FILE {path}: {error.strerror}; put the Ray cluster's token there"
        ) from error
    if not token or not all(33 <= byte <= 126 for byte in token):
        raise ValueError(f"NGD_RAY_TOKEN_FILE {path} must hold one token of visible ASCII characters, and nothing else")
    return token.decode("ascii")


def _first_line(text: str | None) -> str | None:
    return text.strip().partition("\n")[0] if text and text.strip() else None
