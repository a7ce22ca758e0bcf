"""What Kubernetes does to a RayJob that is nobody's fault: full quotas, a server that starts, nodes that die."""

import copy
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from ngd_service.dispatchers import kuberay
from ngd_service.dispatchers.base import (
    AttemptRef,
    BackendFullError,
    BackendRefusedError,
    BackendUnavailableError,
    DispatchError,
)
from ngd_service.dispatchers.kuberay import KubeRayDispatcher
from ngd_service.dispatchers.rayjob import name_of
from ngd_service.dispatchers.unresponsive import Silence
from ngd_service.job_state import Phase, Process
from ngd_service.store.sql import SQLStore
from tests.fakes.kube.cluster import TEMPLATE, KubeCluster
from tests.service.test_kuberay_dispatcher import NAME, launch, now, started
from tests.service.test_reconciler_outages import Controller, phase, post, report
from tests.support.backends import (
    REF,
    KubeRayBackend,
    drivers_in,
    folder_in,
    is_running,
    kuberay_backend,
)
from tests.support.deadline import wait_until

OTHER = AttemptRef("job_01JD0000000000000000000001", 1)
NO_RIGHT = 'User "system:serviceaccount:training:ngd-controller" cannot create resource "rayjobs" in API group "ray.io"'
STARTING = {  # what an API server answers before it has read what it grants
    "roles": (403, f'rayjobs.ray.io is forbidden: {NO_RIGHT} in the namespace "training"'),
    "quota": (403, f'rayjobs.ray.io "{NAME}" is forbidden: not yet ready to handle request'),
    "kinds": (404, "404 page not found"),
    "tokens": (401, "Unauthorized"),
    "storage": (503, "apiserver not ready"),
    "use of the quota": (409, 'Operation cannot be fulfilled on resourcequotas "few"'),
}


@pytest.fixture
def backend(tmp_path: Path, kube_cluster: KubeCluster) -> Iterator[KubeRayBackend]:
    with kuberay_backend(tmp_path / "runs", kube_cluster) as backend:
        yield backend


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SQLStore]:
    store = SQLStore(f"sqlite:///{tmp_path / 'store.sqlite'}")
    yield store
    store.close()


def refuse_to_create(cluster: KubeCluster, what: str, times: int) -> None:
    status, said = STARTING[what]
    refusal = {"kind": "status", "status": status, "message": said}
    cluster.misbehave({"method": "POST", "path": "/rayjobs", "times": times} | refusal)


def message(store: SQLStore, job_id: str) -> str:
    job = store.get_job(job_id)
    assert job is not None
    return job.message or ""


# --- a full quota -----------------------------------------------------------------------------------------------------


def test_second_job_waits_for_room_in_the_quota_and_says_so(backend: KubeRayBackend, store: SQLStore) -> None:
    backend.cluster.limit_rayjobs(1)
    first, second = (post(store, job_id, max_attempts=1) for job_id in (REF.job_id, OTHER.job_id))
    controller = Controller(store, backend.dispatcher(), backend.runs_dir)

    controller.ticks(4)

    (made,) = (rayjob["metadata"]["name"] for rayjob in backend.cluster.rayjobs())
    waiting = first if made == name_of(second) else second
    assert phase(store, waiting) == (Phase.STARTING, 1)
    assert f"RayJob {name_of(waiting)} waits for room in the quota of namespace training" in message(
        store, waiting.job_id
    )
    assert "used: count/rayjobs.ray.io=1, limited: count/rayjobs.ray.io=1" in message(store, waiting.job_id)

    backend.cluster.limit_rayjobs(2)
    controller.ticks(1)

    assert len(backend.cluster.rayjobs()) == 2
    assert phase(store, waiting) == (Phase.STARTING, 1)


def test_full_quota_is_no_fault_of_the_backend(backend: KubeRayBackend) -> None:
    backend.cluster.limit_rayjobs(0)

    with pytest.raises(BackendFullError, match="exceeded quota"):
        backend.dispatcher().submit(launch())


def test_pods_that_a_quota_keeps_from_being_made_are_told_of(backend: KubeRayBackend) -> None:
    backend.cluster.stop_operator()
    dispatcher = backend.dispatcher()
    dispatcher.submit(launch())
    said = 'pods "ngd-head" is forbidden: exceeded quota: few, requested: limits.cpu=4, used: limits.cpu=6'
    failure = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreateHeadPod", "message": said}

    backend.cluster.report(NAME, jobDeploymentStatus="Initializing", rayClusterStatus={"conditions": [failure]})

    assert dispatcher.inspect(REF).message == f"RayJob {NAME} waits for its pods, which can't be made: {said}"


# --- an API server that starts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("refusal", STARTING)
def test_server_that_starts_does_not_fail_the_job(backend: KubeRayBackend, refusal: str) -> None:
    refuse_to_create(backend.cluster, refusal, times=2)
    dispatcher = backend.dispatcher()

    for _ in range(2):
        with pytest.raises(BackendRefusedError):
            dispatcher.submit(launch())
    dispatcher.submit(launch())

    assert backend.cluster.faults_left() == 0
    assert [rayjob["metadata"]["name"] for rayjob in backend.cluster.rayjobs()] == [NAME]


def test_right_that_is_missing_for_good_fails_the_job_after_a_while_and_says_so(backend: KubeRayBackend) -> None:
    refuse_to_create(backend.cluster, "roles", times=9)
    dispatcher, now_s = backend.dispatcher(), [0.0]
    dispatcher._refusals = Silence(lambda: now_s[0])

    with pytest.raises(BackendRefusedError, match="just started refuses too: the job fails if this lasts 120 s"):
        dispatcher.submit(launch())
    now_s[0] += kuberay.STARTS_S / 2
    with pytest.raises(BackendRefusedError, match="cannot create resource"):
        dispatcher.submit(launch())
    now_s[0] += kuberay.STARTS_S / 2

    with pytest.raises(DispatchError, match=r"needs a role with create, get and delete on rayjobs\.ray\.io$"):
        dispatcher.submit(launch())


def test_server_that_does_not_serve_rayjobs_yet_loses_no_attempt(backend: KubeRayBackend) -> None:
    dispatcher = started(backend)
    no_path = {"kind": "status", "status": 404, "message": "404 page not found"}

    backend.cluster.misbehave({"method": "GET", "path": f"/{NAME}", **no_path})

    with pytest.raises(BackendUnavailableError, match=r"refuses to get RayJobs .*\(404\): 404 page not found"):
        dispatcher.inspect(REF)
    assert is_running(dispatcher)


# --- pods that stay ---------------------------------------------------------------------------------------------------


def test_attempt_on_a_node_that_died_ends_though_its_pods_stay(
    backend: KubeRayBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatcher = started(backend)
    backend.cluster.lose_node(NAME)
    dispatcher.kill(REF)
    assert dispatcher.inspect(REF).message == f"RayJob {NAME} is being deleted"
    assert is_running(dispatcher)

    later = impatient(backend, monkeypatch)
    seen = later.inspect(REF)

    assert (seen.process, seen.outcome) == (Process.EXITED, None)
    assert "its pods are still there" in (seen.message or "")
    wait_until(lambda: not backend.cluster.rayjobs(), "the RayJob no longer waits for its pods")
    assert later.inspect(REF).process is Process.EXITED


@pytest.mark.parametrize("is_cancelled", [True, False])
def test_job_on_a_node_that_died_gives_its_slot_back(
    backend: KubeRayBackend, store: SQLStore, monkeypatch: pytest.MonkeyPatch, is_cancelled: bool
) -> None:
    controller = Controller(store, started_as_job(backend, store), backend.runs_dir)
    backend.cluster.lose_node(NAME)
    if is_cancelled:
        store.request_cancel(REF.job_id, datetime.now(UTC))
        controller.ticks(3)
        assert phase(store, REF) == (Phase.CANCELLING, 1)
    else:
        timeout = {"reason": "JobStatusCheckTimeoutExceeded", "message": "checks have been failing"}
        backend.cluster.report(NAME, jobDeploymentStatus="Failed", endTime=now(), **timeout)
        controller.ticks(3)
        assert phase(store, REF)[0] in (Phase.STARTING, Phase.RUNNING)

    Controller(store, impatient(backend, monkeypatch), backend.runs_dir).ticks(1)

    assert phase(store, REF) == (Phase.CANCELLED if is_cancelled else Phase.FAILED, 1)
    if not is_cancelled:
        assert "checks have been failing; its pods are still there" in message(store, REF.job_id)
    assert drivers_in(folder_in(backend).path) == []


def impatient(backend: KubeRayBackend, monkeypatch: pytest.MonkeyPatch) -> KubeRayDispatcher:
    """Returns the dispatcher of a controller to which every pod has had its time."""
    monkeypatch.setattr(kuberay, "PODS_GO_S", -30.0)  # 30 s is the pods' own grace
    return backend.dispatcher()


def started_as_job(backend: KubeRayBackend, store: SQLStore) -> KubeRayDispatcher:
    post(store, REF.job_id, max_attempts=1)
    Controller(store, backend.dispatcher(), backend.runs_dir).ticks(2)
    dispatcher = started(backend)  # it is there already
    report(store, REF)
    Controller(store, dispatcher, backend.runs_dir).ticks(1)
    return dispatcher


def test_patience_with_pods_is_longer_than_their_own_grace(backend: KubeRayBackend) -> None:
    template = copy.deepcopy(TEMPLATE)
    pod = template["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    pod["terminationGracePeriodSeconds"] = 900

    assert backend.dispatcher(template=template)._pods_go_s == 900 + kuberay.PODS_GO_S


# --- what an outage says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "status", "status": 403, "message": f'rayjobs.ray.io "{NAME}" is forbidden: User "x" cannot get'},
        {"kind": "status", "status": 503},
        {"kind": "refuse"},
        None,  # the server is away
    ],
)
def test_outage_names_no_job_for_all_are_told_of_it(backend: KubeRayBackend, fault: dict[str, Any] | None) -> None:
    if fault is None:
        backend.cluster.stop_server()
    else:
        backend.cluster.misbehave({"method": "GET", "path": f"/{NAME}", **fault})

    with pytest.raises(BackendUnavailableError, match="Kubernetes") as caught:
        backend.dispatcher().inspect(REF)

    assert NAME not in str(caught.value)
    if fault is None:
        with pytest.raises(BackendUnavailableError, match="Kubernetes does not answer") as at_create:
            backend.dispatcher()._api.create({"metadata": {"name": NAME}})
        assert NAME not in str(at_create.value)
