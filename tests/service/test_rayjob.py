"""The RayJob of an attempt: what the template keeps, what is filled in, and what can't be."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from ngd_service.dispatchers.base import SPEC_SHA256, AttemptRef, DispatchError, Launch
from ngd_service.dispatchers.rayjob import Group, groups_of, rayjob, read_template, replicas_for
from ngd_service.errors import StartupError
from ngd_workers.contract.spec import Resources
from tests.fakes.kube.cluster import TEMPLATE
from tests.fakes.kube.kuberay import why_invalid
from tests.fakes.kube.rayjob_schema import problems
from tests.support.attempts import small_spec

REF = AttemptRef("job_01JD3F8Z6Q4V5X7Y9A0BCDEFGH", 2)
HEAD = ("spec", "rayClusterSpec", "headGroupSpec", "template")
WORKERS = ("spec", "rayClusterSpec", "workerGroupSpecs", 0)
SIZES = ["Infinity", float("inf"), float("nan"), "-1", "1e999999"]
CPU, GPU = Group("cpu", cpus=4, gpus=0), Group("gpu", cpus=16, gpus=2, max_replicas=8)


def launch(workers: int = 1, **resources: int) -> Launch:
    spec = small_spec(batch={"global_size": workers * 8}, resources={"workers": workers} | resources)
    return Launch(REF, spec.model_dump(mode="json"), "token")


def made(template: dict[str, Any] = TEMPLATE, workers: int = 1, **resources: int) -> dict[str, Any]:
    return rayjob(template, launch(workers, **resources), "sh -c 'exec driver /runs/1'")


def worker_group(content: dict[str, Any], index: int = 0) -> dict[str, Any]:
    return dict(content["spec"]["rayClusterSpec"]["workerGroupSpecs"][index])


def with_group(**changes: Any) -> dict[str, Any]:
    template = copy.deepcopy(TEMPLATE)
    template["spec"]["rayClusterSpec"]["workerGroupSpecs"][0] |= changes
    return template


def test_rayjob_is_named_and_labelled_after_its_attempt() -> None:
    metadata = made()["metadata"]

    assert metadata["name"] == "ngd-01jd3f8z6q4v5x7y9a0bcdefgh-a2"
    assert metadata["labels"] == {
        "kueue.x-k8s.io/queue-name": "gpus",
        "app.kubernetes.io/part-of": "ngd",
        "app.kubernetes.io/managed-by": "ngd-controller",
        "ngd.dev/job-id": REF.job_id,
        "ngd.dev/attempt": "2",
        "ngd.dev/job-name": "small",
    }
    assert metadata["annotations"] == {SPEC_SHA256: launch().spec_sha256}


def test_retries_are_the_services_and_the_cluster_ends_with_the_attempt() -> None:
    spec = made()["spec"]

    assert spec["entrypoint"] == "sh -c 'exec driver /runs/1'"
    assert spec["jobId"] == "ngd-01jd3f8z6q4v5x7y9a0bcdefgh-a2"
    assert (spec["submissionMode"], spec["backoffLimit"]) == ("HTTPMode", 0)
    assert (spec["shutdownAfterJobFinishes"], spec["ttlSecondsAfterFinished"]) == (True, 600)
    assert "activeDeadlineSeconds" not in spec


def test_job_chooses_the_image_of_its_pods() -> None:
    template = copy.deepcopy(TEMPLATE)
    sidecar = {"name": "shipper", "image": "shipper:1"}
    template["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"].append(sidecar)
    spec = small_spec(image="registry.example:5000/ml/mine:2").model_dump(mode="json")

    cluster = rayjob(template, Launch(REF, spec, "token"), "true")["spec"]["rayClusterSpec"]

    head, workers = (
        [container["image"] for container in group["template"]["spec"]["containers"]]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    )
    assert (head, workers) == (["registry.example:5000/ml/mine:2", "shipper:1"], ["registry.example:5000/ml/mine:2"])


def test_what_the_template_says_is_kept() -> None:
    template = copy.deepcopy(TEMPLATE)
    template["spec"] |= {"suspend": True, "ttlSecondsAfterFinished": 60, "runtimeEnvYAML": "env_vars: {A: b}"}
    template["metadata"]["annotations"] = {"team": "vision"}
    before = copy.deepcopy(template)

    content = made(template)

    assert template == before
    assert (content["spec"]["suspend"], content["spec"]["ttlSecondsAfterFinished"]) == (True, 60)
    assert content["metadata"]["annotations"]["team"] == "vision"
    pod = worker_group(content)["template"]
    assert pod["spec"]["containers"][0]["env"] == [{"name": "NCCL_DEBUG", "value": "WARN"}]
    assert pod["metadata"]["labels"]["ngd.dev/job-id"] == REF.job_id


@pytest.mark.parametrize(("workers", "threads", "pods"), [(1, 1, 1), (4, 1, 1), (5, 1, 2), (4, 2, 2), (3, 4, 3)])
def test_as_many_pods_as_the_workers_need(workers: int, threads: int, pods: int) -> None:
    group = worker_group(made(workers=workers, threads_per_worker=threads))

    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (pods, pods, pods)


def test_filled_in_rayjob_is_taken_by_kubernetes_and_by_kuberay() -> None:
    content = made(workers=8)

    assert problems(content) == ([], [])
    assert why_invalid(content) is None


def test_group_that_is_not_needed_has_no_pods() -> None:
    template = copy.deepcopy(TEMPLATE)
    gpu = copy.deepcopy(worker_group(TEMPLATE)) | {"groupName": "gpu", "replicas": 3, "minReplicas": 3}
    gpu["template"]["spec"]["containers"][0]["resources"] = {"limits": {"cpu": "8", "nvidia.com/gpu": 2}}
    template["spec"]["rayClusterSpec"]["workerGroupSpecs"].insert(0, gpu)

    without, with_gpus = made(template, workers=2), made(template, workers=2, gpus_per_worker=1)

    assert [worker_group(without, index)["replicas"] for index in (0, 1)] == [0, 1]
    assert worker_group(without)["minReplicas"] == 0
    assert [worker_group(with_gpus, index)["replicas"] for index in (0, 1)] == [1, 0]


@pytest.mark.parametrize(
    ("changes", "group"),
    [
        ({}, Group("cpu", 4, 0, max_replicas=4)),
        ({"rayStartParams": {"num-cpus": "2"}}, Group("cpu", 2, 0, max_replicas=4)),
        (
            {"resources": {"CPU": "3", "GPU": "1"}, "rayStartParams": {"num-cpus": "2"}},
            Group("cpu", 3, 1, max_replicas=4),
        ),
        ({"rayStartParams": {"num-gpus": "8"}, "numOfHosts": 2}, Group("cpu", 4, 8, hosts=2, max_replicas=4)),
    ],
)
def test_pod_holds_what_kuberay_tells_ray(changes: dict[str, Any], group: Group) -> None:
    assert groups_of(with_group(**changes)) == [group]


@pytest.mark.parametrize(
    ("resources", "cpus", "gpus"),
    [
        ({"limits": {"cpu": "1500m"}}, 2, 0),
        ({"requests": {"cpu": 2}}, 2, 0),
        ({"limits": {"cpu": "8", "nvidia.com/gpu": "4"}, "requests": {"cpu": "1"}}, 8, 4),
        ({"limits": {"cpu": "8", "nvidia.com/mig-1g.10gb": 2}}, 8, 2),
        ({"limits": {"cpu": "8", "amd.com/gpu": 1}}, 8, 1),
    ],
)
def test_quantities_are_counted_as_ray_is_told_them(resources: dict[str, Any], cpus: int, gpus: int) -> None:
    container = {"name": "ray-worker", "resources": resources}

    (group,) = groups_of(with_group(template={"spec": {"containers": [container]}}))

    assert (group.cpus, group.gpus) == (cpus, gpus)


def test_job_without_gpus_leaves_the_gpus_to_others_but_takes_them_if_there_is_nothing_else() -> None:
    assert replicas_for([GPU, CPU], Resources(workers=2)) == (CPU, 1)
    assert replicas_for([GPU], Resources(workers=17)) == (GPU, 2)
    assert replicas_for([CPU, GPU], Resources(workers=2, threads_per_worker=8)) == (GPU, 1)


def test_worker_that_fits_no_pod_is_refused_with_what_there_is() -> None:
    with pytest.raises(DispatchError, match=r"8 CPUs .*threads_per_worker.* 1 GPUs .*\(cpu: 4 CPUs, 0 GPUs\); lower"):
        made(threads_per_worker=8, gpus_per_worker=1)


def test_job_that_needs_more_pods_than_the_group_may_have_is_refused() -> None:
    with pytest.raises(
        DispatchError, match=r"resources.workers 17 need 5 replicas of worker group cpu, .* is 4; lower"
    ):
        made(workers=17)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("kind",), "RayCluster", "must be a RayJob of ray.io/v1, got kind 'RayCluster'"),
        (("metadata", "name"), "x", "metadata.name must not be 'x': the service sets it"),
        (("spec", "entrypoint"), "true", "spec.entrypoint must not be 'true': the service sets it"),
        (("spec", "backoffLimit"), 2, "spec.backoffLimit must not be 2: the service starts a new attempt"),
        (("spec", "submissionMode"), "K8sJobMode", "must not be 'K8sJobMode': the service takes HTTPMode"),
        (("spec", "shutdownAfterJobFinishes"), False, "must not be False"),
        (("spec", "activeDeadlineSeconds"), 60, "must not be 60: jobs have no deadline"),
        (("spec", "clusterSelector"), {"ray.io/cluster": "x"}, "NGD_DISPATCHER=ray_jobs"),
        (("spec", "rayClusterSpec"), None, "headGroupSpec is missing"),
        (("spec", "rayClusterSpec", "workerGroupSpecs"), [], "workerGroupSpecs is empty"),
        (
            ("spec", "rayClusterSpec", "headGroupSpec"),
            {"template": {}},
            "headGroupSpec has no template.spec.containers",
        ),
        (("metadata",), None, "metadata must be a mapping, got null; fill it in or leave it out"),
        (("metadata",), "x", 'metadata must be a mapping, got "x"'),
        (("metadata", "labels"), ["x"], "labels in metadata must be a mapping, got ['x']"),
        (("spec", "rayClusterSpec", "workerGroupSpecs"), {"groupName": "cpu"}, "must be a list of groups, got {"),
        (("spec", "rayClusterSpec", "workerGroupSpecs"), ["cpu"], "must be a list of groups, got ['cpu']"),
        ((*HEAD, "metadata"), None, "template.metadata of headGroupSpec must be a mapping, got null"),
        ((*WORKERS, "template", "metadata"), None, "template.metadata of cpu must be a mapping, got null"),
        ((*WORKERS, "template", "metadata"), {"labels": "x"}, "labels in template.metadata of cpu must be a mapping"),
        ((*WORKERS, "template", "spec", "containers"), {"name": "x"}, "of cpu must be a list of containers"),
        ((*WORKERS, "maxReplicas"), "4", "maxReplicas of worker group cpu must be a whole number from 0 to"),
        ((*WORKERS, "maxReplicas"), 0, "whose maxReplicas is 0"),
        ((*WORKERS, "numOfHosts"), True, "numOfHosts of worker group cpu must be a whole number"),
        ((*WORKERS, "resources"), ["x"], "is not built as a RayJob is: "),
        ((*WORKERS, "rayStartParams"), "x", "is not built as a RayJob is: "),
    ],
)
def test_template_that_no_rayjob_can_be_made_from_is_refused_at_startup(
    tmp_path: Path, path: tuple[str | int, ...], value: object, words: str
) -> None:
    template = copy.deepcopy(TEMPLATE)
    part: Any = template
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    file = tmp_path / "rayjob.yaml"
    file.write_text(yaml.safe_dump(template))

    with pytest.raises(StartupError, match="NGD_RAYJOB_TEMPLATE") as raised:
        read_template(file)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        *(
            ({"limits": {"cpu": size}}, "CPUs of worker group cpu must be a number from 0 to 1,000,000, got")
            for size in SIZES
        ),
        ({}, "ask for no CPUs"),
        ({"limits": {"cpu": "many"}}, "CPUs of worker group cpu must be a number, got 'many'"),
    ],
)
def test_group_whose_size_is_not_known_is_refused(tmp_path: Path, resources: dict[str, Any], words: str) -> None:
    container = {"name": "ray-worker", "resources": resources}
    file = tmp_path / "rayjob.yaml"
    file.write_text(yaml.safe_dump(with_group(template={"spec": {"containers": [container]}})))

    with pytest.raises(StartupError, match=words):
        read_template(file)


@pytest.mark.parametrize(
    ("text", "words"), [("a: [", "is no YAML"), ("", "must hold one RayJob"), (None, "can't read")]
)
def test_file_that_is_no_template_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    file = tmp_path / "rayjob.yaml"
    if text is not None:
        file.write_text(text)

    with pytest.raises(StartupError, match=words):
        read_template(file)
