"""A JSON Schema of the RayCluster that the chart makes, and KubeRay's rules between fields, which no schema says."""

import re
from typing import Any

from tests.fakes.kube.rayjob_schema import CLUSTER, FLAG, LABELS, TEXT, TEXTS, WHOLE, closed

FIRST_RAY_WITH_TOKENS = (2, 52, 0)

SECURITY = closed(
    allowPrivilegeEscalation=FLAG, runAsNonRoot=FLAG, capabilities=closed(drop={"type": "array", "items": TEXT})
)
CLUSTER_SPEC = CLUSTER | {
    "properties": CLUSTER["properties"]
    | {
        "upgradeStrategy": closed(type={"enum": ["None", "Recreate"]}),
        "autoscalerOptions": closed(idleTimeoutSeconds=WHOLE, securityContext=SECURITY),
    }
}
RAY_CLUSTER = closed(
    "apiVersion",
    "kind",
    "metadata",
    "spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayCluster"},
    metadata=closed("name", name=TEXT, namespace=TEXT, labels=LABELS, annotations=TEXTS),
    spec=CLUSTER_SPEC,
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
