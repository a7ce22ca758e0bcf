"""Attempts as RayJobs, one each: KubeRay makes a Ray cluster, runs the driver on its head, and takes it down again.

The RayJob's name is the attempt's, so an attempt has one RayJob however often it is submitted. What KubeRay says of a
driver is only whether it can still be running: the attempt's folder tells the rest.
"""

import contextlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

from pydantic import BaseModel, Field

from ngd_service.dispatchers.base import (
    JOB_ID,
    SPEC_SHA256,
    AttemptRef,
    BackendError,
    BackendRefusedError,
    Dispatcher,
    DispatchError,
    Launch,
    Seen,
)
from ngd_service.dispatchers.files import AttemptFiles, age_s, entrypoint
from ngd_service.dispatchers.rayjob import grace_s, is_of, name_of, rayjob, read_template
from ngd_service.dispatchers.rayjob_api import AlreadyExistsError, NotAllowedError, RayJobApi, connect
from ngd_service.dispatchers.unresponsive import Silence
from ngd_service.failpoint import Failpoint
from ngd_service.job_state import Process
from ngd_service.setting_types import Address, OptionalPath
from ngd_workers.contract.rundir import EXIT_STATUS, Outcome

__all__ = ["KubeRayDispatcher"]

log = logging.getLogger(__name__)

LINGER_S = 60.0  # for KubeRay to notice that a driver which has written its outcome has left
PODS_GO_S = 60.0  # beyond their own grace, for pods that are deleted; those of a dead node never go by themselves
STARTS_S = 120.0  # an API server that has just started may refuse calls for so long that it grants later
EXIT_CODE = re.compile(r"exit code (-?\d+)")
DRIVER_ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})  # jobStatus: Ray's own word
WAITS = {  # jobDeploymentStatus, before the driver runs
    "": "KubeRay has not taken up RayJob {name} yet; is its operator running?",
    "Initializing": "RayJob {name} waits for its pods",
    "Suspended": "RayJob {name} is suspended: it waits to be admitted by its queue",
}


class KubeRaySettings(BaseModel):
    """The RayJob to fill in, and where it goes."""

    rayjob_template: OptionalPath = Field(
        None, description="kuberay: YAML file of the RayJob that is filled in for each attempt."
    )
    kubernetes_url: Address = Field(
        "",
        description="kuberay: API server without credentials (kubectl proxy); empty: the pod's, or the kubeconfig's.",
    )
    kubernetes_namespace: str = Field(
        "",
        pattern=r"^([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)?$",
        description="kuberay: where RayJobs go; empty: the pod's own, or the kubeconfig's.",
    )


@dataclass(frozen=True, slots=True)
class Status:
    """The state of a RayJob, as KubeRay reports it."""

    name: str
    uid: str
    deleted_at: datetime | None
    job: str
    deployment: str
    reason: str
    message: str
    ended_at: datetime | None
    no_pods: str  # why the pods of its Ray cluster can't be made, if they can't

    @classmethod
    def of(cls, rayjob: Mapping[str, Any]) -> "Status":
        metadata, status = rayjob["metadata"], rayjob.get("status") or {}
        ended_at = status.get("endTime") or (status.get("rayJobInfo") or {}).get("endTime")
        return cls(
            name=metadata["name"],
            uid=metadata["uid"],
            deleted_at=_time(metadata.get("deletionTimestamp")),
            job=status.get("jobStatus") or "",
            deployment=status.get("jobDeploymentStatus") or "",
            reason=status.get("reason") or "",
            message=_line(status.get("message")),
            ended_at=_time(ended_at),
            no_pods=_no_pods(status.get("rayClusterStatus") or {}),
        )

    @property
    def is_being_deleted(self) -> bool:
        return self.deleted_at is not None

    @property
    def may_have_an_outcome(self) -> bool:
        """A driver that was killed, or fell over, has written none; Ray tells its exit status in the message."""
        code = EXIT_CODE.search(self.message)
        return code is None or int(code[1]) in EXIT_STATUS.values()

    def sentence(self) -> str | None:
        if self.reason or self.message:
            return f"KubeRay says of RayJob {self.name}: {': '.join(filter(None, (self.reason, self.message)))}"
        return None


class KubeRayDispatcher(Dispatcher[KubeRaySettings]):
    """Has KubeRay run `command ATTEMPT_DIR`."""

    settings_class = KubeRaySettings
    takes_images = True

    def __init__(
        self,
        files: AttemptFiles,
        *,
        api: RayJobApi,
        template: Mapping[str, Any],
        command: Sequence[str],
        failpoint: Failpoint,
    ) -> None:
        self._files = files
        self._api = api
        self._template = template
        self._command = tuple(command)
        self._failpoint = failpoint
        self._last_words: dict[AttemptRef, str] = {}  # of RayJobs that are being deleted
        self._refusals = Silence()  # to create a RayJob
        self._pods_go_s = grace_s(template) + PODS_GO_S

    @classmethod
    def check(cls, settings: KubeRaySettings) -> None:
        if settings.rayjob_template is None:
            raise ValueError(
                "the dispatcher kuberay needs rayjob_template (NGD_RAYJOB_TEMPLATE), the file of a RayJob to fill in"
            )

    @classmethod
    def of(
        cls, settings: KubeRaySettings, files: AttemptFiles, *, command: Sequence[str], failpoint: Failpoint
    ) -> Self:
        """Raises: StartupError if the template can't be used, or there is no way to Kubernetes."""
        assert settings.rayjob_template is not None  # see check
        return cls(
            files,
            api=connect(settings.kubernetes_url, settings.kubernetes_namespace),
            template=read_template(settings.rayjob_template),
            command=command,
            failpoint=failpoint,
        )

    def submit(self, launch: Launch) -> None:
        if self.inspect(launch.ref).process is not Process.UNKNOWN:
            return
        folder = self._files.prepare(launch)
        body = rayjob(self._template, launch, entrypoint(self._command, folder))
        try:
            self._api.create(body)
        except AlreadyExistsError:
            self._adopt(launch.ref, body)
        except NotAllowedError as error:
            self._bear(launch.ref, error)
        self._refusals.is_over(launch.ref)
        self._failpoint.reach("after_spawn")

    def inspect(self, ref: AttemptRef) -> Seen:
        rayjob = self._find(ref)
        outcome = self._files.outcome(ref)
        if rayjob is None:
            was_started = outcome is not None or self._files.folder(ref).started.exists()
            return Seen(Process.EXITED if was_started else Process.UNKNOWN, outcome, self._last_words.pop(ref, None))
        status = Status.of(rayjob)
        if outcome is not None and (status.is_being_deleted or age_s(self._files.folder(ref).outcome) > LINGER_S):
            self._delete(status)
            return Seen(Process.EXITED, outcome)
        if status.deleted_at is not None:
            return self._while_deleted(ref, status, status.deleted_at)
        if status.job in DRIVER_ENDED:
            if outcome is None and status.may_have_an_outcome and self._files.may_still_show(status.ended_at):
                return Seen(Process.RUNNING, message="the driver has ended; its outcome may still come into sight")
            return Seen(Process.EXITED, outcome, status.sentence())
        return self._before_its_end(ref, status)

    def interrupt(self, ref: AttemptRef) -> None:
        self._files.ask_to_stop(ref)

    def kill(self, ref: AttemptRef) -> None:
        self._files.ask_to_stop(ref)  # a create whose answer was lost may be carried out after this
        self._refusals.is_over(ref)
        rayjob = self._find(ref)
        if rayjob is not None:
            self._delete(Status.of(rayjob))

    def _before_its_end(self, ref: AttemptRef, status: Status) -> Seen:
        """Returns the state of an attempt whose driver is not known to have ended."""
        has_started = self._files.folder(ref).started.exists()
        if status.deployment == "ValidationFailed":
            refusal = f"{status.sentence()}; correct the RayJob template (NGD_RAYJOB_TEMPLATE)"
            return Seen(Process.EXITED, Outcome(result="failed", reason="DispatchFailed", message=refusal))
        if status.deployment in ("Complete", "Failed") or (status.deployment == "Suspended" and has_started):
            # KubeRay has given it up or a queue has taken its pods away, while the driver may still run somewhere.
            self._last_words[ref] = status.sentence() or f"RayJob {status.name} was {status.deployment.lower()}"
            log.warning("rayjob_given_up attempt=%s said=%s", ref.attempt_id, self._last_words[ref])
            self._delete(status)
            return Seen(Process.RUNNING, message=self._last_words[ref])
        if self._files.folder(ref).facts.exists():
            self._files.announce(ref)
        waits = None if has_started else WAITS.get(status.deployment)
        if waits is None:
            return Seen(Process.RUNNING)
        cause = f", which can't be made: {status.no_pods}" if status.no_pods else ""
        return Seen(Process.RUNNING, message=waits.format(name=status.name) + cause)

    def _while_deleted(self, ref: AttemptRef, status: Status, deleted_at: datetime) -> Seen:
        """Waits for the pods to end, up to their grace period. Pods of a lost node stay: their attempt is fenced."""
        said = self._last_words.get(ref) or status.sentence() or f"RayJob {status.name} is being deleted"
        if (datetime.now(UTC) - deleted_at).total_seconds() < self._pods_go_s:
            return Seen(Process.RUNNING, message=said)
        log.warning("pods_linger attempt=%s rayjob=%s", ref.attempt_id, status.name)
        self._last_words.pop(ref, None)
        with contextlib.suppress(BackendError):  # the attempt has ended, whether or not its RayJob goes
            self._api.delete(status.name, status.uid, waits_for_pods=False)
        return Seen(
            Process.EXITED,
            message=f"{said}; its pods are still there {self._pods_go_s:g} s after their deletion, as those of a node "
            f"that is away: kubectl get pods -o wide -l {JOB_ID}={ref.job_id}",
        )

    def _bear(self, ref: AttemptRef, refusal: NotAllowedError) -> None:
        """Raises: BackendRefusedError while the API server may only be starting, then DispatchError."""
        if self._refusals.failed(ref) >= STARTS_S:
            self._refusals.is_over(ref)
            raise DispatchError(str(refusal)) from refusal
        raise BackendRefusedError(
            f"{refusal}. An API server that has just started refuses too: the job fails if this lasts {STARTS_S:g} s"
        ) from refusal

    def _adopt(self, ref: AttemptRef, body: Mapping[str, Any]) -> None:
        """Accepts a RayJob that exists if it is this attempt's: the answer to its creation was lost."""
        name = name_of(ref)
        existing = self._api.get(name)
        if existing is None:
            return  # deleted since: the next inspect tells
        said, wanted = (of["metadata"].get("annotations", {}).get(SPEC_SHA256) for of in (existing, body))
        if not is_of(existing, ref) or said != wanted:
            raise DispatchError(
                f"there is a RayJob {name} in namespace {self._api.namespace} that is not of this job; delete or "
                "rename it, or give this installation a namespace of its own (NGD_KUBERNETES_NAMESPACE)"
            )

    def _find(self, ref: AttemptRef) -> dict[str, Any] | None:
        rayjob = self._api.get(name_of(ref))
        return rayjob if rayjob is not None and is_of(rayjob, ref) else None

    def _delete(self, status: Status) -> None:
        if not status.is_being_deleted:
            self._api.delete(status.name, status.uid)


def _line(text: object) -> str:
    return " ".join(str(text or "").split())[:500]


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _no_pods(cluster: Mapping[str, Any]) -> str:
    """Returns the reason why KubeRay can't create pods, such as a full quota; empty if it can."""
    conditions = cluster.get("conditions") or []
    failures = (one for one in conditions if (one.get("type"), one.get("status")) == ("ReplicaFailure", "True"))
    return next((_line(one.get("message")) for one in failures), "")
