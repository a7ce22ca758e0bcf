"""What is KubeRay's own: lost answers, outages, refusals, and all that may happen to a RayJob beside its end."""

import copy
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from ngd_service.dispatchers import files, kuberay, rayjob_api
from ngd_service.dispatchers.base import (
    BackendError,
    BackendRefusedError,
    BackendUnavailableError,
    DispatchError,
    Launch,
)
from ngd_service.dispatchers.kuberay import KubeRayDispatcher
from ngd_service.dispatchers.rayjob import name_of
from ngd_service.job_state import Process
from ngd_workers.contract.rundir import Outcome, write_json
from tests.fakes.kube.cluster import NAMESPACE, TEMPLATE, KubeCluster
from tests.support.attempts import small_spec
from tests.support.backends import (
    REF,
    KubeRayBackend,
    drivers_in,
    folder_in,
    is_running,
    kuberay_backend,
    wait_for_log,
)
from tests.support.deadline import wait_until

NAME = name_of(REF)


@pytest.fixture
def backend(tmp_path: Path, kube_cluster: KubeCluster) -> Iterator[KubeRayBackend]:
    with kuberay_backend(tmp_path, kube_cluster) as backend:
        yield backend


@pytest.fixture
def dispatcher(backend: KubeRayBackend) -> KubeRayDispatcher:
    return backend.dispatcher()


def launch(name: str = "waits", **changes: Any) -> Launch:
    return Launch(REF, small_spec(name=name, **changes).model_dump(mode="json"), "token")


def started(backend: KubeRayBackend, name: str = "waits") -> KubeRayDispatcher:
    """Returns a dispatcher whose attempt runs."""
    dispatcher = backend.dispatcher()
    dispatcher.submit(launch(name))
    wait_for_log(backend)
    wait_until(lambda: status_of(backend, "jobDeploymentStatus") == "Running", "KubeRay says that it runs")
    return dispatcher


def status_of(backend: KubeRayBackend, field: str) -> str:
    return str(backend.cluster.get(NAME).get("status", {}).get(field, ""))


def now() -> str:
    return datetime.now(UTC).isoformat()


# --- submit -----------------------------------------------------------------------------------------------------------


def test_lost_answer_to_create_leaves_one_rayjob(backend: KubeRayBackend, dispatcher: KubeRayDispatcher) -> None:
    backend.cluster.misbehave({"method": "POST", "kind": "lose_answer"})
    with pytest.raises(BackendUnavailableError, match="does not answer"):
        dispatcher.submit(launch())

    dispatcher.submit(launch())

    wait_for_log(backend)
    assert len(backend.cluster.rayjobs()) == 1
    assert len(drivers_in(folder_in(backend).path)) == 1


def test_name_that_is_taken_meanwhile_is_adopted(
    backend: KubeRayBackend, dispatcher: KubeRayDispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.dispatcher().submit(launch())
    uid = backend.cluster.get(NAME)["metadata"]["uid"]
    monkeypatch.setattr(dispatcher, "inspect", lambda _: kuberay.Seen(Process.UNKNOWN))  # it looked before

    dispatcher.submit(launch())

    assert backend.cluster.get(NAME)["metadata"]["uid"] == uid


def test_rayjob_of_another_hand_is_neither_adopted_nor_touched(
    backend: KubeRayBackend, dispatcher: KubeRayDispatcher
) -> None:
    content = copy.deepcopy(TEMPLATE)
    content["metadata"] = {"name": NAME}
    content["spec"]["entrypoint"] = "sleep 600"
    backend.cluster.http.post(backend.cluster.collection, json=content).raise_for_status()

    with pytest.raises(DispatchError, match=rf"RayJob {NAME} in namespace {NAMESPACE} that is not of this job"):
        dispatcher.submit(launch())
    dispatcher.kill(REF)

    assert "deletionTimestamp" not in backend.cluster.get(NAME)["metadata"]
    assert dispatcher.inspect(REF).process is Process.UNKNOWN


def test_rayjob_of_another_spec_is_not_adopted(backend: KubeRayBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    backend.dispatcher().submit(launch())
    dispatcher = backend.dispatcher()
    monkeypatch.setattr(dispatcher, "inspect", lambda _: kuberay.Seen(Process.UNKNOWN))

    with pytest.raises(DispatchError, match="not of this job"):
        dispatcher.submit(launch("steps"))


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "status", "status": 500},
        {"kind": "status", "status": 503, "headers": {"Retry-After": "60"}},
        {"kind": "status", "status": 429, "headers": {"Retry-After": "60"}},
        {"kind": "refuse"},
        {"kind": "hang"},
    ],
)
@pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
def test_server_that_does_not_answer_is_asked_again_later(
    backend: KubeRayBackend,
    dispatcher: KubeRayDispatcher,
    monkeypatch: pytest.MonkeyPatch,
    fault: dict[str, Any],
    method: str,
) -> None:
    monkeypatch.setattr(rayjob_api, "READ_S", 1.0)
    calls: dict[str, Callable[[], object]] = {
        "POST": lambda: dispatcher.submit(launch()),
        "GET": lambda: dispatcher.inspect(REF),
        "DELETE": lambda: dispatcher.kill(REF),
    }
    if method == "DELETE":
        dispatcher.submit(launch())
    path = "/rayjobs" if method == "POST" else f"/{NAME}"  # and not what the operator asks
    backend.cluster.misbehave({"method": method, "path": path, **fault})

    began = time.monotonic()
    with pytest.raises(BackendError, match="Kubernetes") as caught:
        calls[method]()
    # What the server answers to one request says nothing of the other attempts.
    is_one_alone = fault["kind"] == "status" and method != "GET"
    assert isinstance(caught.value, BackendRefusedError if is_one_alone else BackendUnavailableError)

    assert time.monotonic() - began < 20  # whatever Retry-After says, the tick goes on
    assert backend.cluster.faults_left() == 0
    calls[method]()


@pytest.mark.parametrize(
    ("status", "advice"), [(401, "credentials"), (403, "create, get and delete on rayjobs"), (404, "install KubeRay")]
)
def test_refusal_to_create_names_what_to_do_and_refusal_to_look_loses_no_job(
    backend: KubeRayBackend,
    dispatcher: KubeRayDispatcher,
    status: int,
    advice: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kuberay, "STARTS_S", 0.0)  # an API server that starts would be waited for
    backend.cluster.misbehave({"method": "POST", "path": "/rayjobs", "kind": "status", "status": status})
    with pytest.raises(DispatchError, match=rf"refuses to create RayJob {NAME} .*an injected fault; .*{advice}"):
        dispatcher.submit(launch())

    backend.cluster.misbehave({"method": "GET", "path": f"/{NAME}", "kind": "status", "status": status})
    with pytest.raises(BackendUnavailableError, match=advice):
        dispatcher.inspect(REF)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("rayVersoin", "2.60.0", r'\(400\): .*unknown field "spec.rayClusterSpec.rayVersoin"'),
        ("rayVersion", 2.6, "422"),
    ],
)
def test_template_that_kubernetes_does_not_take_is_said(
    backend: KubeRayBackend, field: str, value: object, words: str
) -> None:
    template = copy.deepcopy(TEMPLATE)
    template["spec"]["rayClusterSpec"][field] = value
    dispatcher = backend.dispatcher(template=template)

    with pytest.raises(DispatchError, match=rf"{words}.*NGD_RAYJOB_TEMPLATE.* does not fit"):
        dispatcher.submit(launch())


def test_template_that_kuberay_does_not_take_fails_the_job_at_once(backend: KubeRayBackend) -> None:
    template = copy.deepcopy(TEMPLATE)
    template["spec"]["rayClusterSpec"] |= {"authOptions": {"mode": "token"}}
    del template["spec"]["rayClusterSpec"]["rayVersion"]
    dispatcher = backend.dispatcher(template=template)
    dispatcher.submit(launch())

    wait_until(lambda: dispatcher.inspect(REF).process is Process.EXITED, "KubeRay has refused it")

    outcome = dispatcher.inspect(REF).outcome
    assert outcome is not None
    assert (outcome.result, outcome.reason, outcome.retryable) == ("failed", "DispatchFailed", False)
    assert "RayVersion was not specified; correct the RayJob template" in (outcome.message or "")


# --- what may happen to a RayJob --------------------------------------------------------------------------------------


def test_job_is_told_what_it_waits_for(backend: KubeRayBackend) -> None:
    backend.cluster.stop_operator()
    dispatcher = backend.dispatcher()
    dispatcher.submit(launch())

    seen = dispatcher.inspect(REF)
    assert (seen.process, seen.message) == (
        Process.RUNNING,
        f"KubeRay has not taken up RayJob {NAME} yet; is its operator running?",
    )
    backend.cluster.report(NAME, jobDeploymentStatus="Initializing")
    assert dispatcher.inspect(REF).message == f"RayJob {NAME} waits for its pods"
    backend.cluster.report(NAME, jobDeploymentStatus="Suspended")
    assert "waits to be admitted by its queue" in (dispatcher.inspect(REF).message or "")
    assert is_running(dispatcher)

    dispatcher.kill(REF)
    assert dispatcher.inspect(REF).process is Process.UNKNOWN


def test_rayjob_is_running_until_its_pods_are_gone(backend: KubeRayBackend) -> None:
    dispatcher = started(backend, "deaf")
    backend.cluster.stop_operator()

    dispatcher.kill(REF)
    dispatcher.kill(REF)

    assert dispatcher.inspect(REF).message == f"RayJob {NAME} is being deleted"
    assert is_running(dispatcher)
    backend.cluster.start_operator()
    wait_until(lambda: not is_running(dispatcher), "the pods are gone")
    assert dispatcher.inspect(REF).process is Process.EXITED
    assert drivers_in(folder_in(backend).path) == []


def test_rayjob_deleted_by_somebody_else_is_an_attempt_that_has_ended(backend: KubeRayBackend) -> None:
    dispatcher = started(backend)

    backend.cluster.delete(NAME, "Background")

    wait_until(lambda: dispatcher.inspect(REF).process is Process.EXITED, "the deletion is noticed")
    assert dispatcher.inspect(REF).outcome is None
    dispatcher.submit(launch())
    assert backend.cluster.rayjobs() == []
    wait_until(lambda: not drivers_in(folder_in(backend).path), "its pods are gone")


def test_operator_that_is_started_again_finds_the_driver(backend: KubeRayBackend) -> None:
    dispatcher = started(backend)
    clusters = backend.cluster.clusters_started()
    backend.cluster.stop_operator()
    assert is_running(dispatcher)
    (driver,) = drivers_in(folder_in(backend).path)
    driver.kill()

    backend.cluster.start_operator()

    wait_until(lambda: dispatcher.inspect(REF).process is Process.EXITED, "its end is noticed")
    assert backend.cluster.clusters_started() == clusters


def test_head_that_was_lost_and_made_anew_does_not_run_the_attempt_twice(backend: KubeRayBackend) -> None:
    dispatcher = started(backend)
    (driver,) = drivers_in(folder_in(backend).path)
    entrypoint = backend.cluster.get(NAME)["spec"]["entrypoint"]

    status = backend.cluster.run_as_head(entrypoint)  # as KubeRay does when the new head knows no such job

    assert status == 4
    assert drivers_in(folder_in(backend).path) == [driver]
    assert wait_for_log(backend).count(b"attempt 1") == 1
    assert is_running(dispatcher)


@pytest.mark.parametrize(
    "given_up",
    [
        {
            "jobDeploymentStatus": "Failed",
            "reason": "JobStatusCheckTimeoutExceeded",
            "message": "checks have been failing",
        },
        {"jobDeploymentStatus": "Suspended", "reason": "", "message": ""},
    ],
)
def test_rayjob_whose_driver_may_still_live_is_ended_before_it_counts_as_ended(
    backend: KubeRayBackend, given_up: dict[str, str]
) -> None:
    dispatcher = started(backend, "deaf")
    backend.cluster.stop_operator()
    backend.cluster.report(NAME, **given_up)

    seen = dispatcher.inspect(REF)
    assert seen.process is Process.RUNNING
    assert is_running(dispatcher)
    backend.cluster.start_operator()
    wait_until(lambda: not backend.cluster.rayjobs(), "its pods are gone")

    ended = dispatcher.inspect(REF)
    assert (ended.process, ended.outcome, ended.message) == (Process.EXITED, None, seen.message)
    assert (given_up["message"] or "was suspended") in (ended.message or "")
    assert drivers_in(folder_in(backend).path) == []


def test_outcome_that_the_volume_shows_late_is_waited_for(
    backend: KubeRayBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatcher = started(backend)
    backend.cluster.stop_operator()
    backend.cluster.report(NAME, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED", endTime=now())
    assert is_running(dispatcher)

    write_json(folder_in(backend).outcome, Outcome(result="succeeded", step=9))
    assert dispatcher.inspect(REF).outcome == Outcome(result="succeeded", step=9)

    folder_in(backend).outcome.unlink()
    monkeypatch.setattr(files, "OUTCOME_DELAY_S", 0.0)
    assert dispatcher.inspect(REF).process is Process.EXITED


def test_driver_that_fell_over_is_not_waited_for(backend: KubeRayBackend) -> None:
    dispatcher = started(backend)
    backend.cluster.stop_operator()
    said = "Job entrypoint command failed with exit code 137, last available logs:\n..."
    failed = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed", "message": said}

    backend.cluster.report(NAME, **failed, endTime=now())

    seen = dispatcher.inspect(REF)
    assert seen.process is Process.EXITED
    assert seen.message is not None
    assert seen.message.startswith(f"KubeRay says of RayJob {NAME}: AppFailed: Job entrypoint command failed with exit")


def test_outcome_counts_while_the_operator_is_away(backend: KubeRayBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher = started(backend)
    backend.cluster.stop_operator()
    write_json(folder_in(backend).outcome, Outcome(result="succeeded", step=9))
    assert is_running(dispatcher)

    monkeypatch.setattr(kuberay, "LINGER_S", -1.0)

    assert dispatcher.inspect(REF).outcome == Outcome(result="succeeded", step=9)
