"""What the API server accepts as a RayJob: names, types and choices of the fields that the service and its chart use.

Pods (core/v1) are open here. KubeRay's own rules, which its operator checks, are in `tests.fakes.kube.kuberay`.
"""

from typing import Any

from jsonschema import Draft202012Validator

Json = dict[str, Any]

FOREGROUND = "foregroundDeletion"  # the finalizer of a deletion that waits for pods

TEXT = {"type": "string"}
WHOLE = {"type": "integer"}
FLAG = {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
LABEL_VALUE = r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$"
LABELS = {"type": "object", "additionalProperties": {"type": "string", "maxLength": 63, "pattern": LABEL_VALUE}}
TIME = {"type": "string", "format": "date-time"}


def closed(*required: str, **properties: Json) -> Json:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


POD = closed(
    metadata=closed(labels=LABELS, annotations=TEXTS),
    spec={
        "type": "object",
        "required": ["containers"],
        "properties": {
            "containers": {
                "type": "array",
                "items": {"type": "object", "required": ["name"], "properties": {"name": TEXT, "image": TEXT}},
            }
        },
    },
)
HEAD = closed(
    "template",
    template=POD,
    rayStartParams=TEXTS,
    resources=TEXTS,
    labels=TEXTS,
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    headService={"type": "object"},
    enableIngress=FLAG,
)
WORKERS = closed(
    "groupName",
    "minReplicas",
    "maxReplicas",
    "template",
    groupName=TEXT,
    replicas=WHOLE,
    minReplicas=WHOLE,
    maxReplicas=WHOLE,
    numOfHosts=WHOLE,
    idleTimeoutSeconds=WHOLE,
    suspend=FLAG,
    template=POD,
    rayStartParams=TEXTS,
    resources=TEXTS,
    labels=TEXTS,
)
CLUSTER = closed(
    "headGroupSpec",
    rayVersion=TEXT,
    headGroupSpec=HEAD,
    workerGroupSpecs={"type": "array", "items": WORKERS},
    authOptions=closed(mode={"enum": ["disabled", "token"]}, secretName=TEXT, enableK8sTokenAuth=FLAG),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions={"type": "object"},
    headServiceAnnotations=TEXTS,
    suspend=FLAG,
)
RAYJOB = closed(
    "apiVersion",
    "kind",
    "metadata",
    "spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=closed(
        "name",
        name={"type": "string", "maxLength": 253, "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"},
        namespace=TEXT,
        labels=LABELS,
        annotations=TEXTS,
        finalizers={"type": "array", "items": TEXT},
        ownerReferences={"type": "array"},
        resourceVersion=TEXT,
        uid=TEXT,
        generation=WHOLE,
        creationTimestamp=TEXT,
        deletionTimestamp=TEXT,
        managedFields={"type": "array"},
    ),
    spec=closed(
        entrypoint=TEXT,
        jobId=TEXT,
        metadata=TEXTS,
        runtimeEnvYAML=TEXT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        backoffLimit=WHOLE,
        activeDeadlineSeconds=WHOLE,
        preRunningDeadlineSeconds={"type": "integer", "minimum": 1},
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=WHOLE,
        suspend=FLAG,
        managedBy={"enum": ["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"]},
        clusterSelector=TEXTS,
        entrypointNumCpus={"type": "number"},
        entrypointNumGpus={"type": "number"},
        entrypointResources=TEXT,
        submitterPodTemplate=POD,
        submitterConfig=closed(backoffLimit=WHOLE),
        rayClusterSpec=CLUSTER,
    ),
    status=closed(
        jobId=TEXT,
        jobStatus={"enum": ["", "PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]},
        jobDeploymentStatus={
            "enum": [
                "",
                "Initializing",
                "Running",
                "Complete",
                "Failed",
                "ValidationFailed",
                "Suspending",
                "Suspended",
                "Retrying",
                "Waiting",
            ]
        },
        rayClusterName=TEXT,
        dashboardURL=TEXT,
        reason=TEXT,
        message=TEXT,
        startTime=TIME,
        endTime=TIME,
        rayJobInfo=closed(startTime=TIME, endTime=TIME),
        succeeded=WHOLE,
        failed=WHOLE,
        observedGeneration=WHOLE,
        rayClusterStatus={"type": "object"},
    ),
)
_VALIDATOR = Draft202012Validator(RAYJOB)


def problems(content: Json) -> tuple[list[str], list[tuple[str, str]]]:
    """Returns the paths of unknown fields, and (path, what is wrong) of the others."""
    unknown: list[str] = []
    wrong: list[tuple[str, str]] = []
    for error in _VALIDATOR.iter_errors(content):
        path = [str(part) for part in error.absolute_path]
        if error.validator == "additionalProperties" and error.validator_value is False:
            unknown += [
                ".".join([*path, name]) for name in sorted(set(error.instance) - set(error.schema["properties"]))
            ]
        else:
            wrong.append((".".join(path), error.message))
    return unknown, wrong


def without_unknown(content: Json) -> Json:
    """Returns the content as it is stored: fields that the schema does not know are dropped."""

    def pruned(value: Any, schema: Json) -> Any:
        if isinstance(value, list):
            return [pruned(item, schema.get("items", {})) for item in value]
        if not isinstance(value, dict):
            return value
        known = schema.get("properties", {})
        is_closed = schema.get("additionalProperties") is False
        return {
            name: pruned(item, known.get(name, {})) for name, item in value.items() if name in known or not is_closed
        }

    return dict(pruned(content, RAYJOB))
