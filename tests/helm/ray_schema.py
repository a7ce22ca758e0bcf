"""A JSON Schema of the RayCluster and RayJob fields that the chart sets, after KubeRay 1.6's API.

Pods are checked apart. KubeRay's own rules between fields, which no schema says, are in broken_rules.
"""

import re
from typing import Any

Schema = dict[str, Any]

MAX_CLUSTER_NAME, MAX_JOB_NAME = 53, 47
FIRST_RAY_WITH_TOKENS = (2, 52, 0)
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0, "maximum": 2147483647}


def _closed(properties: Schema, *required: str) -> Schema:
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": list(required)}


POD_TEMPLATE = _closed(
    {"metadata": _closed({"labels": TEXTS, "annotations": TEXTS}), "spec": {"type": "object"}}, "spec"
)
HEAD = _closed(
    {
        "serviceType": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        "rayStartParams": TEXTS,
        "template": POD_TEMPLATE,
    },
    "template",
)
WORKERS = _closed(
    {
        "groupName": {"type": "string", "minLength": 1},
        "replicas": COUNT,
        "minReplicas": COUNT,
        "maxReplicas": COUNT,
        "rayStartParams": TEXTS,
        "template": POD_TEMPLATE,
    },
    "groupName",
    "minReplicas",
    "maxReplicas",
    "template",
)
SECURITY = _closed(
    {
        "allowPrivilegeEscalation": {"type": "boolean"},
        "runAsNonRoot": {"type": "boolean"},
        "capabilities": _closed({"drop": {"type": "array", "items": {"type": "string"}}}),
    }
)
CLUSTER_SPEC = _closed(
    {
        "rayVersion": {"type": "string"},
        "upgradeStrategy": _closed({"type": {"enum": ["None", "Recreate"]}}),
        "enableInTreeAutoscaling": {"type": "boolean"},
        "autoscalerOptions": _closed({"idleTimeoutSeconds": COUNT, "securityContext": SECURITY}),
        "authOptions": _closed({"mode": {"enum": ["disabled", "token"]}, "secretName": {"type": "string"}}),
        "headGroupSpec": HEAD,
        "workerGroupSpecs": {"type": "array", "items": WORKERS},
    },
    "headGroupSpec",
)
METADATA = _closed(
    {"name": {"type": "string"}, "namespace": {"type": "string"}, "labels": TEXTS, "annotations": TEXTS}, "labels"
)


def _object(kind: str, spec: Schema) -> Schema:
    fields = {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}, "metadata": METADATA, "spec": spec}
    return _closed(fields, *fields)


RAY_CLUSTER = _object("RayCluster", CLUSTER_SPEC)
RAY_JOB = _object(
    "RayJob",
    _closed(
        {
            "rayClusterSpec": CLUSTER_SPEC,
            "ttlSecondsAfterFinished": COUNT,
        },
        "rayClusterSpec",
    ),
)


def broken_rules(spec: dict[str, Any], *, of_job: bool) -> list[str]:
    """Returns what KubeRay would refuse or misunderstand in a cluster's spec. of_job: the spec stands in a RayJob."""
    found: list[str] = []
    if of_job and "upgradeStrategy" in spec:
        found.append("upgradeStrategy is for clusters that stand alone")
    if spec.get("authOptions", {}).get("mode") == "token":
        version = tuple(map(int, re.findall(r"\d+", spec.get("rayVersion", ""))[:3]))
        if version < FIRST_RAY_WITH_TOKENS:
            found.append(f"tokens need rayVersion 2.52.0 or newer, got {spec.get('rayVersion')!r}")
    groups = spec.get("workerGroupSpecs", [])
    if len({group["groupName"] for group in groups}) < len(groups):
        found.append("group names must differ")
    for group in groups:
        low, now, high = group["minReplicas"], group.get("replicas", 0), group["maxReplicas"]
        if not low <= now <= high:
            found.append(f"{group['groupName']}: {low} <= {now} <= {high} does not hold")
    for group in [spec["headGroupSpec"], *groups]:
        if "labels" in group.get("rayStartParams", {}):
            found.append("rayStartParams.labels is not taken")
        restart = group["template"]["spec"].get("restartPolicy", "Never")
        if spec.get("enableInTreeAutoscaling") and restart != "Never":
            found.append("with the autoscaler restartPolicy must be Never")
    return found
