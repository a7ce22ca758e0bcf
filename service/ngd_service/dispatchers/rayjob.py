"""Pure: the RayJob of an attempt, made from the installation's template (NGD_RAYJOB_TEMPLATE).

The template is a whole RayJob without the fields of one attempt: name, entrypoint, jobId and the workers' replicas.
What it says of pods, volumes, env, queues (labels, suspend), runtimeEnvYAML and ttlSecondsAfterFinished is kept.
"""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from math import ceil
from pathlib import Path
from typing import Any

import yaml

from ngd_service.dispatchers.base import JOB_ID, SPEC_SHA256, AttemptRef, DispatchError, Launch
from ngd_service.errors import StartupError
from ngd_workers.contract.spec import Resources

__all__ = ["Group", "grace_s", "groups_of", "is_of", "name_of", "rayjob", "read_template", "replicas_for"]

Json = dict[str, Any]

API_VERSION = "ray.io/v1"
ATTEMPT, JOB_NAME = "ngd.dev/attempt", "ngd.dev/job-name"  # labels, beside JOB_ID
TTL_S = 600  # of the pods, should no controller be there to delete the RayJob once it has ended
SUFFIXES = {"m": Decimal("0.001"), "k": Decimal(1000), "": Decimal(1)}  # of CPU and GPU quantities

# HTTPMode, because the other modes follow the driver through a pod of their own, whose lost connection would end a run
# that is well, and hand the entrypoint to a second shell.
SUBMISSION_MODE = "HTTPMode"

OWN = "the service sets it for each attempt; leave it out"
MADE_HERE = {  # a template may give a field these values, or leave it out
    ("metadata", "name"): ((), OWN),
    ("metadata", "generateName"): ((), OWN),
    ("metadata", "namespace"): ((), "the service sets it; set NGD_KUBERNETES_NAMESPACE"),
    ("status",): ((), "KubeRay writes it; leave it out"),
    ("spec", "entrypoint"): ((), OWN),
    ("spec", "jobId"): ((), OWN),
    ("spec", "backoffLimit"): ((0,), "the service starts a new attempt itself; leave it out"),
    ("spec", "submissionMode"): ((SUBMISSION_MODE,), "the service takes HTTPMode; leave it out"),
    ("spec", "shutdownAfterJobFinishes"): ((True,), "an attempt's Ray cluster ends with it; leave it out"),
    ("spec", "activeDeadlineSeconds"): ((), "jobs have no deadline; leave it out"),
    ("spec", "clusterSelector"): (
        (),
        "each attempt has a Ray cluster of its own; take NGD_DISPATCHER=ray_jobs instead",
    ),
    ("spec", "deletionStrategy"): ((), "the service deletes the RayJob of an attempt that has ended; leave it out"),
}


TRIAL = Launch(
    AttemptRef("job_trial", 1), {"name": "trial", "resources": {"workers": 1}}, ""
)  # fits where any job fits
MAX_SIZE = 1_000_000  # of each count
POD_GRACE_S = 30  # terminationGracePeriodSeconds of a pod that says nothing


@dataclass(frozen=True, slots=True)
class Group:
    """What Ray sees of a worker group: CPUs and GPUs of a pod, pods of a replica, and how many replicas it may have."""

    name: str
    cpus: int
    gpus: int
    hosts: int = 1
    max_replicas: int | None = None

    def workers(self, resources: Resources) -> int:
        """Returns how many workers a replica holds."""
        by_cpu = self.cpus // resources.threads_per_worker
        by_gpu = self.gpus // resources.gpus_per_worker if resources.gpus_per_worker else by_cpu
        return min(by_cpu, by_gpu) * self.hosts


def read_template(path: Path) -> Json:
    """Returns the template. Raises: StartupError with one sentence if RayJobs can't be made from it."""
    where = f"the RayJob template {path} (NGD_RAYJOB_TEMPLATE)"
    try:
        template = yaml.safe_load(path.read_text())
    except OSError as error:
        raise StartupError(f"can't read {where}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StartupError(f"{where} is no YAML: {' '.join(str(error).split())}") from error
    try:
        _check(template)
        rayjob(template, TRIAL, "true")  # a template with faults ends the start, not each job
        grace_s(template)
    except (ValueError, DispatchError) as error:
        raise StartupError(f"{where}: {error}") from error
    except (TypeError, AttributeError, LookupError) as error:
        raise StartupError(
            f"{where} is not built as a RayJob is: {error}; compare it with KubeRay's examples"
        ) from error
    return dict(template)


def rayjob(template: Mapping[str, Any], launch: Launch, entrypoint: str) -> Json:
    """Returns the RayJob that runs `entrypoint`. Raises: DispatchError if the pods can't hold the job's workers."""
    body = copy.deepcopy(dict(template))
    labels = _labels(launch)
    name = name_of(launch.ref)
    metadata = body.setdefault("metadata", {})
    metadata["name"] = name
    metadata["labels"] = (metadata.get("labels") or {}) | labels
    metadata["annotations"] = (metadata.get("annotations") or {}) | {SPEC_SHA256: launch.spec_sha256}
    spec = body["spec"]
    spec |= {
        "entrypoint": entrypoint,
        "jobId": name,
        "submissionMode": SUBMISSION_MODE,
        "backoffLimit": 0,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": spec.get("ttlSecondsAfterFinished", TTL_S),
    }
    cluster = spec["rayClusterSpec"]
    chosen, replicas = replicas_for(groups_of(body), Resources.model_validate(launch.spec.get("resources") or {}))
    for group in cluster["workerGroupSpecs"]:
        group |= {"replicas": 0, "minReplicas": 0}
        if group["groupName"] == chosen.name:
            group |= {"replicas": replicas, "minReplicas": replicas, "maxReplicas": replicas}
        group.setdefault("maxReplicas", 0)
    image = launch.spec.get("image")
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):  # so that labels lead to a job's pods
        pod = group["template"].setdefault("metadata", {})
        pod["labels"] = (pod.get("labels") or {}) | labels
        if image is not None:
            group["template"]["spec"]["containers"][0]["image"] = image  # Ray runs in the first
    return body


def replicas_for(groups: Sequence[Group], resources: Resources) -> tuple[Group, int]:
    """Returns the group that the job's workers go to and how many replicas they need. Raises: DispatchError.

    The first group whose pods can hold a worker; a job without GPUs takes one without GPUs if there is any.
    """
    fitting = [group for group in groups if group.workers(resources)]
    if not fitting:
        have = "; ".join(f"{group.name}: {group.cpus} CPUs, {group.gpus} GPUs" for group in groups)
        raise DispatchError(
            f"a worker needs {resources.threads_per_worker} CPUs (resources.threads_per_worker) and "
            f"{resources.gpus_per_worker} GPUs (resources.gpus_per_worker), but no worker group's pods have as many "
            f"({have}); lower them, or have the pods of the RayJob template made larger"
        )
    if not resources.gpus_per_worker:
        fitting.sort(key=lambda group: group.gpus > 0)
    needs = [(group, ceil(resources.workers / group.workers(resources))) for group in fitting]
    for group, replicas in needs:
        if group.max_replicas is None or replicas <= group.max_replicas:
            return group, replicas
    group, replicas = needs[0]
    raise DispatchError(
        f"resources.workers {resources.workers} need {replicas} replicas of worker group {group.name}, whose "
        f"maxReplicas is {group.max_replicas}; lower resources.workers, or have maxReplicas raised"
    )


def groups_of(template: Mapping[str, Any]) -> list[Group]:
    """Returns the template's worker groups as KubeRay starts Ray in them. Raises: ValueError."""
    return [_group(content) for content in template["spec"]["rayClusterSpec"]["workerGroupSpecs"]]


def name_of(ref: AttemptRef) -> str:
    """Returns the name of the attempt's RayJob, the same at each call."""
    return f"ngd-{ref.job_id.removeprefix('job_').lower()}-a{ref.number}"


def is_of(rayjob: Mapping[str, Any], ref: AttemptRef) -> bool:
    """Returns whether a RayJob with the attempt's name was made for it."""
    labels = rayjob["metadata"].get("labels") or {}
    return (labels.get(JOB_ID), labels.get(ATTEMPT)) == (ref.job_id, str(ref.number))


def grace_s(template: Mapping[str, Any]) -> float:
    """Returns the longest time that a pod of the template may take to end."""
    cluster = template["spec"]["rayClusterSpec"]
    groups = (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    given = (_at(group, ("template", "spec", "terminationGracePeriodSeconds")) for group in groups)
    return float(max(POD_GRACE_S if seconds is None else seconds for seconds in given))


def _labels(launch: Launch) -> dict[str, str]:
    return {
        "app.kubernetes.io/part-of": "ngd",
        "app.kubernetes.io/managed-by": "ngd-controller",
        JOB_ID: launch.ref.job_id,
        ATTEMPT: str(launch.ref.number),
        JOB_NAME: str(launch.spec.get("name", "")),
    }


def _check(template: object) -> None:
    if not isinstance(template, dict):
        raise ValueError(f"must hold one RayJob, got {type(template).__name__}")
    kind = (template.get("apiVersion"), template.get("kind"))
    if kind != (API_VERSION, "RayJob"):
        raise ValueError(f"must be a RayJob of {API_VERSION}, got kind {kind[1]!r} of {kind[0]!r}")
    for path, (allowed, advice) in MADE_HERE.items():
        value = _at(template, path)
        if value is not None and value not in allowed:
            raise ValueError(f"{'.'.join(path)} must not be {value!r}: {advice}")
    cluster = _at(template, ("spec", "rayClusterSpec"))
    if not isinstance(cluster, dict) or not isinstance(cluster.get("headGroupSpec"), dict):
        raise ValueError("spec.rayClusterSpec.headGroupSpec is missing: what the head's pod is like")
    groups = cluster.get("workerGroupSpecs")
    if not groups:
        raise ValueError(
            "spec.rayClusterSpec.workerGroupSpecs is empty: give the group of pods that the workers run in"
        )
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise ValueError(f"spec.rayClusterSpec.workerGroupSpecs must be a list of groups, got {groups!r}")
    _check_metadata(template, "metadata")
    for part in (cluster["headGroupSpec"], *groups):
        name = part.get("groupName", "headGroupSpec")
        containers = _at(part, ("template", "spec", "containers"))
        if not containers:
            raise ValueError(f"{name} has no template.spec.containers")
        if not isinstance(containers, list) or not isinstance(containers[0], dict):
            raise ValueError(f"template.spec.containers of {name} must be a list of containers, got {containers!r}")
        _check_metadata(part["template"], f"template.metadata of {name}")


def _check_metadata(content: Mapping[str, Any], what: str) -> None:
    metadata = content.get("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"{what} must be a mapping, got {json.dumps(metadata)}; fill it in or leave it out")
    for kind in ("labels", "annotations"):
        if not isinstance(metadata.get(kind) or {}, dict):
            raise ValueError(f"{kind} in {what} must be a mapping, got {metadata[kind]!r}")


def _at(content: Any, path: Sequence[str]) -> Any:
    for name in path:
        content = content.get(name) if isinstance(content, dict) else None
    return content


def _group(content: Mapping[str, Any]) -> Group:
    name = content.get("groupName")
    if not name:
        raise ValueError("a worker group has no groupName")
    container = content["template"]["spec"]["containers"][0]  # Ray runs in the first
    limits, requests = (_at(container, ("resources", kind)) or {} for kind in ("limits", "requests"))
    declared = {key.lower(): value for key, value in (content.get("resources") or {}).items()}
    params = content.get("rayStartParams") or {}
    cpus = _first(declared.get("cpu"), params.get("num-cpus"), limits.get("cpu"), requests.get("cpu"))
    if cpus is None:
        raise ValueError(f"the pods of worker group {name} ask for no CPUs: set resources.limits.cpu of the container")
    gpus = _first(*_gpus(declared), params.get("num-gpus"), *_gpus(limits))
    return Group(
        name,
        cpus=_whole(cpus, f"CPUs of worker group {name}"),
        gpus=_whole(gpus or 0, f"GPUs of worker group {name}"),
        hosts=_count(content.get("numOfHosts"), f"numOfHosts of worker group {name}") or 1,
        max_replicas=_count(content.get("maxReplicas"), f"maxReplicas of worker group {name}"),
    )


def _gpus(resources: Mapping[str, Any]) -> Iterator[Any]:
    return (
        value for key, value in sorted(resources.items()) if key.endswith("gpu") or key.startswith("nvidia.com/mig-")
    )


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _count(value: object, what: str) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_SIZE:
        raise ValueError(f"{what} must be a whole number from 0 to {MAX_SIZE:,}, got {value!r}")
    return value


def _whole(quantity: object, what: str) -> int:
    """Returns a Kubernetes quantity as Ray is told it: rounded up."""
    text = str(quantity).strip("\"' ")
    number = text.rstrip("mk")
    try:
        size = Decimal(number) * SUFFIXES[text[len(number) :]]
    except (InvalidOperation, KeyError) as error:
        raise ValueError(f"{what} must be a number, got {quantity!r}") from error
    if not size.is_finite() or not 0 <= size <= MAX_SIZE:
        raise ValueError(f"{what} must be a number from 0 to {MAX_SIZE:,}, got {quantity!r}")
    return ceil(size)
