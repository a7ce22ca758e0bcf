"""What runs attempts in the contract suite: each backend makes the dispatchers that controllers on it would have."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import psutil
from ulid import ULID

from ngd_service.dispatchers import kuberay, local, ray_jobs
from ngd_service.dispatchers.base import AttemptRef, Dispatcher
from ngd_service.dispatchers.files import AttemptFiles
from ngd_service.dispatchers.kuberay import KubeRayDispatcher
from ngd_service.dispatchers.local import LocalDispatcher
from ngd_service.dispatchers.ray_jobs import RayJobsDispatcher
from ngd_service.dispatchers.rayjob_api import connect
from ngd_service.failpoint import Failpoint
from ngd_service.job_state import Process
from ngd_workers.contract.rundir import AttemptDir
from tests.fakes.kube.cluster import TEMPLATE, KubeCluster
from tests.support.deadline import wait_until
from tests.support.ray_head import RayHead
from tests.support.service_process import FAULT_DRIVER

REF = AttemptRef("job_01JD0000000000000000000000", 1)
NOWHERE = "http://127.0.0.1:1"


class Backend(Protocol):
    runs_dir: Path
    module: ModuleType  # of the dispatcher; has LINGER_S
    ref: AttemptRef  # which attempt the backend is used for

    def files(self, url: str = NOWHERE) -> AttemptFiles: ...

    def dispatcher(self, url: str = NOWHERE, command: tuple[str, ...] = FAULT_DRIVER) -> Dispatcher:
        """Returns a dispatcher as a controller, and the one after its death, would have; nothing answers at `url`."""
        ...


class LocalBackend:
    module = local
    ref = REF

    def __init__(self, runs_dir: Path) -> None:
        self.runs_dir = runs_dir
        self.made: list[LocalDispatcher] = []

    def files(self, url: str = NOWHERE) -> AttemptFiles:
        return AttemptFiles(runs_dir=self.runs_dir, data_dir=None, worker_url=url, cluster="own")

    def dispatcher(self, url: str = NOWHERE, command: tuple[str, ...] = FAULT_DRIVER) -> LocalDispatcher:
        self.made.append(LocalDispatcher(self.files(url), command=command, failpoint=Failpoint(None)))
        return self.made[-1]


class KubeRayBackend:
    module = kuberay
    ref = REF

    def __init__(self, runs_dir: Path, cluster: KubeCluster) -> None:
        self.runs_dir = runs_dir
        self.cluster = cluster

    def files(self, url: str = NOWHERE) -> AttemptFiles:
        return AttemptFiles(runs_dir=self.runs_dir, data_dir=None, worker_url=url, cluster="given")

    def dispatcher(
        self, url: str = NOWHERE, command: tuple[str, ...] = FAULT_DRIVER, template: dict[str, Any] = TEMPLATE
    ) -> KubeRayDispatcher:
        return KubeRayDispatcher(
            self.files(url),
            api=connect("", ""),  # by the kubeconfig
            template=template,
            command=command,
            failpoint=Failpoint(None),
        )


class RayJobsBackend:
    module = ray_jobs

    def __init__(self, runs_dir: Path, head: RayHead) -> None:
        self.runs_dir = runs_dir
        self.head = head
        self.ref = AttemptRef(f"job_{ULID()}", 1)  # Ray gives a submission id away once
        self.made: list[RayJobsDispatcher] = []

    def files(self, url: str = NOWHERE) -> AttemptFiles:
        return AttemptFiles(runs_dir=self.runs_dir, data_dir=None, worker_url=url, cluster="given")

    def dispatcher(self, url: str = NOWHERE, command: tuple[str, ...] = FAULT_DRIVER) -> RayJobsDispatcher:
        self.made.append(
            RayJobsDispatcher(
                self.files(url),
                address=self.head.address,
                token_file=self.head.token_file,
                command=command,
                failpoint=Failpoint(None),
            )
        )
        return self.made[-1]


@contextmanager
def local_backend(runs_dir: Path) -> Iterator[LocalBackend]:
    backend = LocalBackend(runs_dir)
    yield backend
    for dispatcher in backend.made:
        dispatcher.kill(REF)
        wait_until(lambda dispatcher=dispatcher: not is_running(dispatcher), "the driver is gone")
        # A zombie can be waited for once its last thread has ended.
        wait_until(lambda dispatcher=dispatcher: dispatcher.inspect(REF) and not dispatcher._children, "it is reaped")


@contextmanager
def kuberay_backend(runs_dir: Path, cluster: KubeCluster) -> Iterator[KubeRayBackend]:
    yield KubeRayBackend(runs_dir, cluster)
    cluster.clear()


@contextmanager
def ray_jobs_backend(runs_dir: Path, head: RayHead) -> Iterator[RayJobsBackend]:
    backend = RayJobsBackend(runs_dir, head)
    yield backend
    dispatcher = backend.dispatcher()
    dispatcher.kill(backend.ref)
    wait_until(lambda: not is_running(dispatcher, backend.ref), "the driver is gone", timeout_s=60)
    for made in backend.made:
        made.close()


def is_running(dispatcher: Dispatcher, ref: AttemptRef = REF) -> bool:
    return dispatcher.inspect(ref).process is Process.RUNNING


def folder_in(backend: Backend, ref: AttemptRef | None = None) -> AttemptDir:
    ref = ref or backend.ref
    return AttemptDir.of(backend.runs_dir / ref.job_id, ref.number)


def wait_for_log(backend: Backend, ref: AttemptRef | None = None) -> bytes:
    """Returns what the driver has written, as soon as it has written something."""
    ref = ref or backend.ref
    wait_until(lambda: backend.files().log(ref).tail().text, "the driver has written something")
    return backend.files().log(ref).tail().text


def drivers_in(folder: Path) -> list[psutil.Process]:
    """Returns the living processes whose last word is the attempt's folder: its drivers."""
    found = psutil.process_iter(["cmdline", "status"])
    living = [process for process in found if process.info["status"] != psutil.STATUS_ZOMBIE]
    return [process for process in living if (process.info["cmdline"] or [""])[-1] == str(folder)]
