"""What pods carry: what keeps jobs where they are, no reason to restart, and what the values add to Ray's."""

import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from tests.support.chart import (
    CHART,
    ROOT,
    SCENARIO,
    Object,
    pod_templates,
    ray_cluster_specs,
    render,
    values_of,
)

STAYS = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
KUBERAY = {"dispatcher": {"mode": "kuberay"}}
GIB = 2**30


def annotations(pod: Object) -> dict[str, str]:
    return pod["metadata"].get("annotations") or {}


def ray_pods(**ray_cluster: Any) -> tuple[Object, Object]:
    """Returns the head and the first group's worker of a chart with these values of rayCluster."""
    pods = pod_templates(render(KUBERAY | {"rayCluster": ray_cluster}))
    return pods["ray-head"], pods["ray-worker/workers"]


@SCENARIO
def test_pods_whose_loss_ends_attempts_are_not_moved_to_save_nodes(scenario: str) -> None:
    runs_jobs = values_of(scenario).get("dispatcher", {}).get("mode", "local") == "local"

    for name, pod in pod_templates(render(values_of(scenario))).items():
        stays = name.startswith("ray-") or (name == "Deployment/ngd-controller" and runs_jobs)
        assert (STAYS.items() <= annotations(pod).items()) == stays, name


def test_pods_may_be_moved_where_the_values_say_so() -> None:
    may = {"doNotDisrupt": False}
    local = pod_templates(render({"dispatcher": {"local": may}}))["Deployment/ngd-controller"]
    mine = {"controller": {"podAnnotations": {"karpenter.sh/do-not-disrupt": "false"}}}
    overruled = pod_templates(render(mine))["Deployment/ngd-controller"]

    _, of_group = ray_pods(workerGroups=[{"name": "workers"} | may])
    for pod in (*ray_pods(head=may, workerDefaults=may), of_group, local):
        assert not STAYS.keys() & annotations(pod).keys()
    assert annotations(overruled)["karpenter.sh/do-not-disrupt"] == "false"


def mounts_of(pod: Object) -> set[str]:
    return {
        mount["mountPath"] for container in pod["spec"]["containers"] for mount in container.get("volumeMounts", [])
    }


def test_secrets_of_jobs_are_mounted_where_jobs_run() -> None:
    secrets = {"storage": {"secrets": {"existingSecret": "job-secrets"}}}
    folder = "/etc/ngd/job-secrets"

    local = pod_templates(render(secrets))["Deployment/ngd-controller"]
    kuberay = pod_templates(render(KUBERAY | secrets))

    with_them = {name for name, pod in kuberay.items() if folder in mounts_of(pod)}
    assert with_them == {"ray-head", "ray-worker/workers"}
    assert folder in mounts_of(local)
    for pod in (local, kuberay["Deployment/ngd-controller"]):
        assert {"name": "NGD_SECRETS_DIR", "value": folder} in pod["spec"]["containers"][0]["env"]
    assert folder not in mounts_of(pod_templates(render({}))["Deployment/ngd-controller"])


@SCENARIO
def test_a_new_version_of_the_chart_alone_restarts_nothing(scenario: str, tmp_path: Path) -> None:
    later = tmp_path / "ngd"
    shutil.copytree(CHART, later)
    text = (CHART / "Chart.yaml").read_text()
    (later / "Chart.yaml").write_text(re.sub(r"^version: .*$", "version: 9.9.9", text, flags=re.MULTILINE))
    values = values_of(scenario)

    before, after = pod_templates(render(values)), pod_templates(render(values, chart=later))

    assert text != (later / "Chart.yaml").read_text()
    for pods in (before, after):
        pods.pop("Pod/ngd-test", None)  # helm test makes it each time
    assert after == before


def test_variables_of_rays_pods_come_from_texts_secrets_and_each_other() -> None:
    token = {"secretKeyRef": {"name": "hub", "key": "token"}}
    head, worker = ray_pods(
        env={"HF_TOKEN": token, "WHERE": "both"},
        head={"env": {"WHERE": "head"}, "envFrom": [{"secretRef": {"name": "of-the-head"}}]},
        workerDefaults={"envFrom": [{"configMapRef": {"name": "of-workers"}}]},
        workerGroups=[{"name": "workers", "env": {"NODE": {"fieldRef": {"fieldPath": "spec.nodeName"}}}}],
    )

    containers = [pod["spec"]["containers"][0] for pod in (head, worker)]
    of_head, of_worker = ({one["name"]: one for one in container["env"]} for container in containers)
    assert of_head["HF_TOKEN"] == of_worker["HF_TOKEN"] == {"name": "HF_TOKEN", "valueFrom": token}
    assert (of_head["WHERE"]["value"], of_worker["WHERE"]["value"]) == ("head", "both")
    assert of_worker["NODE"]["valueFrom"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}
    assert "NODE" not in of_head
    assert [container["envFrom"] for container in containers] == [
        [{"secretRef": {"name": "of-the-head"}}],
        [{"configMapRef": {"name": "of-workers"}}],
    ]


def test_rays_pods_take_volumes_init_containers_and_topology_spread() -> None:
    spread = {"maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "ScheduleAnyway"}
    more = {
        "extraVolumes": [{"name": "cache", "emptyDir": {}}],
        "extraVolumeMounts": [{"name": "cache", "mountPath": "/cache"}],
        "initContainers": [{"name": "fetch", "image": "fetch:1", "securityContext": {"readOnlyRootFilesystem": False}}],
        "topologySpreadConstraints": [spread],
    }

    for pod in ray_pods(head=more, workerGroups=[{"name": "workers"} | more]):
        spec = pod["spec"]
        assert spec["volumes"][-1] == {"name": "cache", "emptyDir": {}}
        assert spec["containers"][0]["volumeMounts"][-1] == {"name": "cache", "mountPath": "/cache"}
        (fetch,) = spec["initContainers"]
        # The Pod Security level restricted asks every container for these; what is given wins.
        assert fetch["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": False,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert spec["topologySpreadConstraints"] == [spread]


@SCENARIO
def test_head_has_memory_for_every_driver(scenario: str) -> None:
    """2.5 GiB for Ray, 0.75 GiB for each job: docs/operations.md, section 7."""
    values = values_of(scenario)
    is_shared = values.get("rayCluster", {}).get("enabled", False)
    drivers = values.get("settings", {}).get("maxRunningJobs", 1) if is_shared else 1

    for cluster in ray_cluster_specs(render(values)):
        (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
        limit, request = (head["resources"][kind]["memory"] for kind in ("limits", "requests"))
        assert limit == request
        assert int(limit.removesuffix("Gi")) * GIB >= 2.5 * GIB + drivers * 0.75 * GIB


@SCENARIO
def test_examples_do_not_lean_on_what_was_retired(scenario: str) -> None:
    if scenario.startswith("environment-"):
        assert "nginx" not in yaml.safe_dump(render(values_of(scenario)))


def test_commands_of_the_guide_touch_one_installation_and_keep_no_line_break() -> None:
    commands = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "operations.md").read_text(), re.DOTALL)
    lines = [line for block in commands for line in block.splitlines()]

    for line in lines:
        if re.search(r"kubectl .*(delete|scale) (deployment|rayjobs|pvc)", line):
            assert "app.kubernetes.io/instance=ngd" in line, line
        if "/dev/stdin" in line:
            assert 'printf %s "' in line, line


def test_worker_s_pod_that_is_deleted_drains_its_node_for_as_long_as_it_may_stay() -> None:
    _, worker = ray_pods(workerDefaults={"terminationGracePeriodSeconds": 90})

    hook = worker["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert hook[:2] == ["/bin/sh", "-c"]
    assert hook[2] == (
        "ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION "
        '--reason-message "its pod is deleted" --deadline-remaining-seconds 85; sleep 85'
    )
