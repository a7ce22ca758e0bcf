"""A job on KubeRay while Kubernetes, the operator or somebody with kubectl gets in the way: it runs once."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ngd_service.client.client import Client
from ngd_service.dispatchers.base import AttemptRef
from ngd_service.dispatchers.rayjob import name_of
from ngd_service.resources import Job
from tests.fakes.kube.cluster import TEMPLATE, KubeCluster
from tests.service.test_crash import assert_nothing_lost_or_doubled, drivers, spec, wait_for_step
from tests.support.deadline import wait_until
from tests.support.service_process import ServiceProcess

Start = Callable[..., ServiceProcess]


def name(job: Job, attempt: int = 1) -> str:
    return name_of(AttemptRef(job.id, attempt))


def assert_ran_once(cluster: KubeCluster, service: ServiceProcess, job: Job) -> None:
    ended = service.client.wait(job.id, timeout_s=90)
    assert (ended.status.phase, ended.status.attempt) == ("SUCCEEDED", 1)
    assert_nothing_lost_or_doubled(service, ended)
    assert service.client.logs(job.id).count("attempt 1 of steps") == 1
    assert cluster.times_created()[name(job)] == 1
    wait_until(lambda: not cluster.rayjobs(), "the RayJob of the ended attempt is gone")


def wait_for_message(client: Client, job: Job, words: str) -> None:
    wait_until(lambda: words in (client.get(job.id).status.message or ""), f"the job says {words!r}", timeout_s=40)


@pytest.mark.slow
def test_job_goes_on_while_kubernetes_does_not_answer(start_on_kuberay: Start, kube_cluster: KubeCluster) -> None:
    service = start_on_kuberay()
    job = service.client.submit(spec(steps=500))
    wait_for_step(service.client, job.id, 20)

    kube_cluster.stop_server()
    wait_for_message(service.client, job, "Kubernetes does not answer")
    step = service.client.get(job.id).status.progress.step
    wait_for_step(service.client, job.id, step + 20)
    assert service.client.get(job.id).status.phase == "RUNNING"
    kube_cluster.start_server()

    assert_ran_once(kube_cluster, service, job)


@pytest.mark.slow
def test_job_submitted_while_kubernetes_does_not_answer_starts_when_it_does(
    start_on_kuberay: Start, kube_cluster: KubeCluster
) -> None:
    service = start_on_kuberay()
    kube_cluster.stop_server()
    job = service.client.submit(spec(steps=30))
    wait_for_message(service.client, job, "Kubernetes does not answer")
    assert service.client.get(job.id).status.phase == "STARTING"

    kube_cluster.start_server()

    assert_ran_once(kube_cluster, service, job)


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "lose_answer", "times": 1},
        {"kind": "status", "status": 500, "times": 3},
        {"kind": "status", "status": 403, "times": 3},  # an API server that starts
    ],
)
def test_create_that_fails_or_is_not_answered_makes_one_rayjob(
    start_on_kuberay: Start, kube_cluster: KubeCluster, fault: dict[str, object]
) -> None:
    service = start_on_kuberay()
    kube_cluster.misbehave({"method": "POST", "path": "/rayjobs", **fault})

    job = service.client.submit(spec(steps=30))

    assert_ran_once(kube_cluster, service, job)
    assert kube_cluster.faults_left() == 0


@pytest.mark.slow
def test_job_that_finds_the_quota_full_runs_when_there_is_room(
    start_on_kuberay: Start, kube_cluster: KubeCluster
) -> None:
    service = start_on_kuberay(max_running_jobs=2)
    kube_cluster.limit_rayjobs(1)
    first, second = (service.client.submit(spec(steps=steps)) for steps in (200, 30))

    wait_for_message(service.client, second, f"RayJob {name(second)} waits for room in the quota")

    assert service.client.wait(first.id, timeout_s=90).status.phase == "SUCCEEDED"
    assert_ran_once(kube_cluster, service, second)


@pytest.mark.slow
def test_job_goes_on_while_the_operator_is_away(start_on_kuberay: Start, kube_cluster: KubeCluster) -> None:
    service = start_on_kuberay()
    job = service.client.submit(spec(steps=100))
    wait_for_step(service.client, job.id, 10)

    kube_cluster.stop_operator()
    wait_until(lambda: not drivers(service, job.id), "the driver has ended", timeout_s=40)
    assert service.client.get(job.id).status.phase == "RUNNING"
    kube_cluster.start_operator()

    assert_ran_once(kube_cluster, service, job)


@pytest.mark.slow
def test_rayjob_that_somebody_deletes_is_followed_by_another(
    start_on_kuberay: Start, kube_cluster: KubeCluster
) -> None:
    service = start_on_kuberay()
    job = service.client.submit(spec(steps=200))
    wait_for_step(service.client, job.id, 10)

    kube_cluster.delete(name(job))

    ended = service.client.wait(job.id, timeout_s=90)
    assert (ended.status.phase, ended.status.attempt) == ("SUCCEEDED", 2)
    assert_nothing_lost_or_doubled(service, ended, attempt=1)
    assert_nothing_lost_or_doubled(service, ended, attempt=2)
    assert [kube_cluster.times_created()[name(job, attempt)] for attempt in (1, 2)] == [1, 1]


@pytest.mark.slow
def test_attempt_given_up_in_a_long_silence_is_ended_before_the_next(
    start_on_kuberay: Start, kube_cluster: KubeCluster
) -> None:
    service = start_on_kuberay(unreachable_s=0.5)
    job = service.client.submit(spec(steps=10_000))
    wait_for_step(service.client, job.id, 5)

    kube_cluster.stop_server()
    wait_until(lambda: service.client.get(job.id).status.attempt == 2, "the attempt is given up", timeout_s=40)
    kube_cluster.start_server()

    wait_until(lambda: name(job, 2) in kube_cluster.times_created(), "the next one is made", timeout_s=40)
    wait_until(lambda: len(kube_cluster.rayjobs()) == 1, "the first one is gone", timeout_s=40)
    assert kube_cluster.rayjobs()[0]["metadata"]["name"] == name(job, 2)
    wait_until(lambda: len(drivers(service, job.id)) == 1, "one driver runs", timeout_s=40)


def test_job_that_fits_no_pod_fails_with_what_to_do(start_on_kuberay: Start, kube_cluster: KubeCluster) -> None:
    service = start_on_kuberay()

    posted = service.client.submit(spec(resources={"gpus_per_worker": 1}))
    ended = service.client.wait(posted.id, timeout_s=40)

    assert (ended.status.phase, ended.status.reason) == ("FAILED", "DispatchFailed")
    assert "no worker group's pods have as many (cpu: 4 CPUs, 0 GPUs)" in (ended.status.message or "")
    assert name(posted) not in kube_cluster.times_created()


@pytest.mark.slow
def test_job_that_waits_for_the_operator_says_so_and_can_be_cancelled(
    start_on_kuberay: Start, kube_cluster: KubeCluster
) -> None:
    kube_cluster.stop_operator()
    service = start_on_kuberay(interrupt_grace_s=0.2)
    job = service.client.submit(spec())
    wait_for_message(service.client, job, "is its operator running?")

    service.client.cancel(job.id)

    assert service.client.wait(job.id, timeout_s=40).status.phase == "CANCELLED"
    wait_until(lambda: not kube_cluster.rayjobs(), "its RayJob is gone")


def test_rayjob_that_kuberay_does_not_take_fails_the_job_at_its_first_attempt(
    start_on_kuberay: Start, kube_cluster: KubeCluster, tmp_path: Path
) -> None:
    template = copy.deepcopy(TEMPLATE)
    template["spec"]["rayClusterSpec"] |= {"authOptions": {"mode": "token"}}
    del template["spec"]["rayClusterSpec"]["rayVersion"]
    file = tmp_path / "refused.yaml"
    file.write_text(yaml.safe_dump(template))
    service = start_on_kuberay(rayjob_template=str(file))

    ended = service.client.wait(service.client.submit(spec()).id, timeout_s=40)

    assert (ended.status.phase, ended.status.reason, ended.status.attempt) == ("FAILED", "DispatchFailed", 1)
    assert "RayVersion was not specified; correct the RayJob template" in (ended.status.message or "")
    wait_until(lambda: not kube_cluster.rayjobs(), "its RayJob is gone")
