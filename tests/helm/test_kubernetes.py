"""Would a cluster take it? Kubernetes' own schemas, KubeRay's rules, Pod Security's level and a policy scanner."""

import functools
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import referencing
import yaml
from kubernetes_validate.utils import schema_contents

from ngd_service.dispatchers.base import AttemptRef, Launch
from ngd_service.dispatchers.rayjob import rayjob
from tests.fakes.kube.kuberay import why_invalid
from tests.fakes.kube.rayjob_schema import problems
from tests.helm.ray_schema import RAY_CLUSTER, broken_rules
from tests.support.chart import (
    CHECKOV,
    MONITORING,
    SCENARIO,
    VALUES,
    Object,
    containers,
    only,
    pod_templates,
    ray_cluster_specs,
    ray_job_template,
    render,
    render_with_helm3,
    tool,
    values_of,
)

# The oldest that Chart.yaml takes, one in the middle, and the newest whose schemas are here.
NEWEST = "1.37.0"
KUBERNETES = ("1.27.0", "1.32.0", NEWEST)
CUSTOM = {"RayCluster", "HTTPRoute", "ServiceMonitor", "PodMonitor", "PrometheusRule"}


@functools.cache
def validator(kind: str, api_version: str, kubernetes: str) -> jsonschema.Draft202012Validator:
    """Kubernetes' schema of one kind, which knows no field but its own."""
    folder = f"kubernetes-json-schema/v{kubernetes}-local-strict"
    group, _, version = api_version.rpartition("/")
    name = f"{kind.lower()}-{group.partition('.')[0]}-{version}" if group else f"{kind.lower()}-{version}"
    schema = schema_contents(f"{folder}/{name}.json", kubernetes)
    resources = [referencing.Resource.from_contents(one) for one in (schema, _definitions(folder, kubernetes))]
    return jsonschema.Draft202012Validator(schema, registry=resources @ referencing.Registry())


@functools.cache
def _definitions(folder: str, kubernetes: str) -> Any:
    return schema_contents(f"{folder}/_definitions.json", kubernetes)


def as_pods(objects: list[Object]) -> Iterator[Object]:
    """Yields the pods that custom objects would lead to, which Kubernetes sees only later."""
    for spec in ray_cluster_specs(objects):
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            template = group["template"]
            yield {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray", **template["metadata"]}} | {
                "spec": template["spec"]
            }


@pytest.mark.parametrize("kubernetes", KUBERNETES)
@SCENARIO
def test_every_object_fits_kubernetes_schema(scenario: str, kubernetes: str) -> None:
    objects = render_for(scenario, kubernetes)

    checked = [one for one in objects if one["kind"] not in CUSTOM] + list(as_pods(objects))
    for one in checked:
        errors = [error.message for error in validator(one["kind"], one["apiVersion"], kubernetes).iter_errors(one)]
        assert errors == [], f"{one['kind']} {one['metadata']['name']}"
    assert checked


def render_for(scenario: str, kubernetes: str) -> list[Object]:
    """As a cluster of that version would get it."""
    values = values_of(scenario)
    if kubernetes < "1.31":  # which has no such claims, and can't pack strictly
        for group in values.get("rayCluster", {}).get("workerGroups", []):
            group.pop("resourceClaims", None)
            group.pop("pack", None)
    return render_with_helm3(values, kubernetes=kubernetes) if kubernetes != NEWEST else render(values)


def test_schema_check_notices_a_misspelt_field() -> None:
    service = only(render({}), "Service")
    service["spec"]["sessionAfinity"] = "None"

    assert list(validator("Service", "v1", "1.37.0").iter_errors(service))


@SCENARIO
def test_ray_objects_follow_kuberays_rules(scenario: str) -> None:
    objects = render(values_of(scenario))

    for one in objects:
        if one["kind"] == "RayCluster":
            jsonschema.validate(one, RAY_CLUSTER)
            assert broken_rules(one["spec"], of_job=False) == []
    if values_of(scenario).get("dispatcher", {}).get("mode") == "kuberay":
        job = filled_in(ray_job_template(objects))
        assert problems(job) == ([], [])
        assert why_invalid(job) is None
        assert broken_rules(job["spec"]["rayClusterSpec"], of_job=True) == []


def filled_in(template: Object) -> Object:
    """As the controller sends it for an attempt of a job with two workers."""
    spec = {"name": "digits", "resources": {"workers": 2}}
    launch = Launch(AttemptRef("job_01KB0000000000000000000000", 1), spec, "token")
    return rayjob(template, launch, "python -m ngd_workers.launch /var/lib/ngd/runs/job/attempts/1")


def test_pods_of_an_attempt_keep_the_labels_that_policies_select() -> None:
    template = ray_job_template(render(values_of("airgap")))
    before, after = (job["spec"]["rayClusterSpec"] for job in (template, filled_in(template)))

    for old, new in zip(
        [before["headGroupSpec"], *before["workerGroupSpecs"]],
        [after["headGroupSpec"], *after["workerGroupSpecs"]],
        strict=True,
    ):
        assert old["template"]["metadata"]["labels"].items() <= new["template"]["metadata"]["labels"].items()


def test_rules_of_kuberay_can_be_broken() -> None:
    spec = ray_job_template(render(values_of("airgap")))["spec"]["rayClusterSpec"]
    spec |= {"upgradeStrategy": {"type": "Recreate"}, "rayVersion": "2.51.9"}
    spec["workerGroupSpecs"][0]["replicas"] = 99
    spec["headGroupSpec"]["rayStartParams"]["labels"] = "a=b"

    assert len(broken_rules(spec, of_job=True)) == 4
    spec["headGroupSpec"]["enableIngres"] = True
    with pytest.raises(jsonschema.ValidationError, match="enableIngres"):
        jsonschema.validate(spec, RAY_CLUSTER["properties"]["spec"])


@SCENARIO
def test_heads_train_nothing_and_ask_for_no_gpu(scenario: str) -> None:
    for spec in ray_cluster_specs(render(values_of(scenario))):
        head = spec["headGroupSpec"]
        assert head["rayStartParams"]["num-cpus"] == "0"
        assert not any("/" in name for name in head["template"]["spec"]["containers"][0]["resources"]["limits"])


def not_restricted(pod: Object) -> list[str]:
    """Returns what Pod Security's level "restricted" (Kubernetes 1.37) would refuse in this pod."""
    spec, found = pod["spec"], []
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            found.append(field)
    for volume in spec.get("volumes", []):
        allowed = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected"}
        found += [f"volume {kind}" for kind in set(volume) - {"name"} - allowed - {"secret"}]
    for container in containers(pod):
        context = container.get("securityContext", {})
        capabilities = context.get("capabilities", {})
        seccomp = context.get("seccompProfile", spec["securityContext"].get("seccompProfile", {}))
        if context.get("privileged") or context.get("allowPrivilegeEscalation") is not False:
            found.append("privileges")
        if not context.get("runAsNonRoot", spec["securityContext"].get("runAsNonRoot")):
            found.append("root")
        if context.get("runAsUser", spec["securityContext"].get("runAsUser")) == 0:
            found.append("user 0")
        if seccomp.get("type") not in {"RuntimeDefault", "Localhost"}:
            found.append("seccomp")
        if capabilities.get("drop") != ["ALL"]:
            found.append("capabilities are not dropped")
        found += [f"capability {name}" for name in set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}]
        found += ["host port" for port in container.get("ports", []) if port.get("hostPort")]
    return found


@SCENARIO
def test_pods_pass_pod_security_restricted_but_for_rdma(scenario: str) -> None:
    pods = pod_templates(render(values_of(scenario)))

    refused = {name: why for name, pod in pods.items() if (why := not_restricted(pod))}

    expected = {"kuberay-gpu-rdma", "environment-production"}
    assert refused == ({"ray-worker/h100": ["capability IPC_LOCK"]} if scenario in expected else {})


@SCENARIO
def test_every_container_is_read_only_small_and_bounded(scenario: str) -> None:
    for name, pod in pod_templates(render(values_of(scenario))).items():
        for container in containers(pod):
            assert container["securityContext"]["readOnlyRootFilesystem"], name
            assert {"cpu", "memory", "ephemeral-storage"} <= set(container["resources"]["requests"]), name
            assert "memory" in container["resources"]["limits"], name
            mounted = {mount["mountPath"] for mount in container.get("volumeMounts", [])}
            assert "/tmp" in mounted or pod["metadata"]["labels"]["app.kubernetes.io/component"] == "test"


@SCENARIO
def test_only_kuberays_controllers_hold_a_token_of_kubernetes(scenario: str) -> None:
    values = values_of(scenario)
    objects = render(values)
    is_kuberay = values.get("dispatcher", {}).get("mode") == "kuberay"
    is_autoscaled = values.get("rayCluster", {}).get("autoscaling", {}).get("enabled", False)

    for name, pod in pod_templates(objects).items():
        may = is_kuberay if name.startswith("Deployment/") else name == "ray-head" and is_autoscaled
        assert pod["spec"]["automountServiceAccountToken"] is may, name
    roles = [one for one in objects if one["kind"] == "Role"]
    assert len(roles) == is_kuberay
    for role in roles:
        assert [rule["resources"] for rule in role["rules"]] == [["rayjobs"]]
        assert set(role["rules"][0]["verbs"]) == {"create", "get", "delete"}


@SCENARIO
def test_no_secret_stands_in_a_variable_or_a_config_map(scenario: str) -> None:
    objects = render(values_of(scenario))
    generated = {value for one in objects if one["kind"] == "Secret" for value in one["data"].values()}

    for one in objects:
        if one["kind"] != "Secret":
            assert not any(value in yaml.safe_dump(one) for value in generated)
    for pod in pod_templates(objects).values():
        for variable in (variable for container in containers(pod) for variable in container.get("env", [])):
            assert "PASSWORD" not in variable["name"] or "secretKeyRef" in variable["valueFrom"]
            who = variable.get("value", "").partition("//")[2].rpartition("@")[0]
            assert ":" not in who, "a URL with a password"


# Checks of the scanner that are left out everywhere, and why.
SKIPPED = {
    "CKV_K8S_35": "PostgreSQL's URL or password is a variable, as libpq takes it; API keys, tokens and keys are files",
    "CKV_K8S_43": "images are named by tag unless a digest is given; ci/airgap-values.yaml gives digests",
    "CKV_K8S_15": "tags are versions and never move, so IfNotPresent is right, and works without a registry",
    "CKV_K8S_8": "helm's test pod runs once and ends; Ray's pods get their probes from KubeRay",
    "CKV_K8S_9": "as CKV_K8S_8",
}
TOKEN_OF_KUBERNETES, ADDED_CAPABILITY = "CKV_K8S_38", "CKV_K8S_25"
# What it finds and is meant to be so.
MEANT = {
    ("kuberay", TOKEN_OF_KUBERNETES, "Deployment"),  # the controllers make RayJobs
    ("autoscaling", TOKEN_OF_KUBERNETES, "Pod"),  # Ray's autoscaler beside the head makes pods
    ("rdma", ADDED_CAPABILITY, "Pod"),  # IPC_LOCK
}


@pytest.mark.slow
def test_policy_scanner_finds_nothing_more(tmp_path: Path) -> None:
    checkov = tool(CHECKOV, "the policy scanner")
    for scenario in VALUES:
        objects = render(values_of(scenario))
        for number, pod in enumerate(as_pods(objects)):
            pod["metadata"] |= {"name": f"ray-{number}", "namespace": "ngd"}
            objects.append(pod)
        (tmp_path / f"{scenario}.yaml").write_text(yaml.safe_dump_all(objects))

    done = subprocess.run(
        [checkov, "-d", tmp_path, "--framework", "kubernetes", "--skip-download", "--compact", "--quiet", "-o", "json"],
        capture_output=True,
        text=True,
        check=False,
    )

    report = json.loads(done.stdout)
    assert report["summary"]["passed"] > 1000
    seen: set[object] = set()
    for one in report["results"]["failed_checks"]:
        values = values_of(one["file_path"].strip("/").removesuffix(".yaml"))
        why = {(feature, one["check_id"], one["resource"].partition(".")[0]) for feature in features(values)} & MEANT
        assert why or one["check_id"] in SKIPPED, (one["check_name"], one["resource"], one["file_path"])
        seen |= why or {one["check_id"]}
    assert seen == MEANT | set(SKIPPED), "an exception that is no longer needed"


def features(values: dict[str, Any]) -> set[str]:
    ray = values.get("rayCluster", {})
    found = {values.get("dispatcher", {}).get("mode", "local")}
    found |= {"autoscaling"} if ray.get("autoscaling", {}).get("enabled") else set()
    found |= {"rdma"} if any(group.get("rdma") for group in ray.get("workerGroups", [])) else set()
    return found


def test_monitoring_objects_have_the_fields_that_the_operator_reads() -> None:
    objects = render_with_helm3(values_of("postgres-ha"), apis=(MONITORING,))

    assert set(only(objects, "ServiceMonitor")["spec"]) == {"selector", "endpoints"}
    assert set(only(objects, "PodMonitor")["spec"]) == {"selector", "podMetricsEndpoints"}
    assert set(only(objects, "PrometheusRule")["spec"]) == {"groups"}
