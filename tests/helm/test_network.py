"""Who may reach whom. The policies are evaluated as a cluster would, for the connections that matter."""

from typing import Any

import pytest

from tests.support.chart import Object, pod_templates, render, values_of

RAY_MODES = pytest.mark.parametrize("scenario", ["postgres-ha", "kuberay-gpu-rdma", "airgap"])
Peer = tuple[str, dict[str, str]]  # namespace and labels

STRANGER: Peer = ("ngd", {"app": "stranger"})
ELSEWHERE: Peer = ("default", {"app": "stranger"})
PROMETHEUS: Peer = ("monitoring", {"app.kubernetes.io/name": "prometheus"})
INGRESS: Peer = ("ingress-nginx", {"app.kubernetes.io/name": "ingress-nginx"})
GATEWAY: Peer = ("envoy-gateway-system", {"app.kubernetes.io/name": "envoy"})
OPERATOR: Peer = ("kuberay", {"app.kubernetes.io/name": "kuberay-operator"})
DNS: Peer = ("kube-system", {"k8s-app": "kube-dns"})


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """A label selector, of which the chart uses equality and In."""
    if not selector.get("matchLabels", {}).items() <= labels.items():
        return False
    return all(
        one["operator"] == "In" and labels.get(one["key"]) in one["values"]
        for one in selector.get("matchExpressions", [])
    )


def is_peer(rule: dict[str, Any], peer: Peer) -> bool:
    namespace, labels = peer
    if "ipBlock" in rule:
        return False
    if "namespaceSelector" in rule:
        if not matches(rule["namespaceSelector"], {"kubernetes.io/metadata.name": namespace}):
            return False
    elif namespace != "ngd":
        return False
    return matches(rule.get("podSelector", {}), labels)


def may(objects: list[Object], direction: str, pod: dict[str, str], peer: Peer, port: int) -> bool:
    """Whether policies let this pod talk: direction Ingress (peer -> pod's port) or Egress (pod -> peer's port)."""
    policies = [
        one["spec"]
        for one in objects
        if one["kind"] == "NetworkPolicy"
        and direction in one["spec"]["policyTypes"]
        and matches(one["spec"]["podSelector"], pod)
    ]
    rules = [rule for policy in policies for rule in policy.get(direction.lower(), [])]
    side = "from" if direction == "Ingress" else "to"
    return not policies or any(
        ("ports" not in rule or port in {one["port"] for one in rule["ports"]})
        and (side not in rule or any(is_peer(one, peer) for one in rule[side]))
        for rule in rules
    )


def labels_of(objects: list[Object], name: str) -> dict[str, str]:
    """As the running pod has them: KubeRay adds its own to Ray's."""
    found: dict[str, str] = dict(pod_templates(objects)[name]["metadata"]["labels"])
    kuberay = {"app.kubernetes.io/name": "kuberay", "app.kubernetes.io/created-by": "kuberay-operator"}
    return kuberay | found if name.startswith("ray-") else found


def connects(objects: list[Object], source: str, target: str, port: int) -> bool:
    here, there = labels_of(objects, source), labels_of(objects, target)
    return may(objects, "Egress", here, ("ngd", there), port) and may(objects, "Ingress", there, ("ngd", here), port)


def worker_of(objects: list[Object]) -> str:
    return next(name for name in pod_templates(objects) if name.startswith("ray-worker"))


@RAY_MODES
def test_workers_reach_the_controllers_and_each_other(scenario: str) -> None:
    objects = render(values_of(scenario))
    worker = worker_of(objects)

    assert connects(objects, worker, "Deployment/ngd-controller", 8000)
    assert connects(objects, worker, worker, 40123)
    assert connects(objects, worker, "ray-head", 6379)
    assert connects(objects, "ray-head", worker, 40123)


@RAY_MODES
def test_strangers_reach_neither_heads_nor_controllers(scenario: str) -> None:
    objects = render(values_of(scenario))

    for peer in (STRANGER, ELSEWHERE):
        for port in (6379, 8265, 10001, 8080):
            assert not may(objects, "Ingress", labels_of(objects, "ray-head"), peer, port)
            assert not may(objects, "Ingress", labels_of(objects, worker_of(objects)), peer, port)
        assert not may(objects, "Ingress", labels_of(objects, "Deployment/ngd-controller"), peer, 8000)


def test_controllers_reach_the_head_that_they_submit_to_and_no_other() -> None:
    shared, own = render(values_of("postgres-ha")), render(values_of("airgap"))

    assert connects(shared, "Deployment/ngd-controller", "ray-head", 8265)
    for port in (6379, 10001):
        assert not connects(shared, "Deployment/ngd-controller", "ray-head", port)
    assert not connects(own, "Deployment/ngd-controller", "ray-head", 8265)


def test_kuberays_operator_reaches_the_heads_that_it_submits_to() -> None:
    shared, objects = render(values_of("postgres-ha")), render(values_of("airgap"))

    assert not may(shared, "Ingress", labels_of(shared, "ray-head"), OPERATOR, 8265)
    assert may(objects, "Ingress", labels_of(objects, "ray-head"), OPERATOR, 8265)
    assert not may(objects, "Ingress", labels_of(objects, "ray-head"), OPERATOR, 10001)


@RAY_MODES
def test_every_pod_finds_names(scenario: str) -> None:
    objects = render(values_of(scenario))

    for name in pod_templates(objects):
        assert may(objects, "Egress", labels_of(objects, name), DNS, 53), name


@RAY_MODES
def test_prometheus_reads_metrics(scenario: str) -> None:
    objects = render(values_of(scenario))

    assert may(objects, "Ingress", labels_of(objects, "Deployment/ngd-controller"), PROMETHEUS, 8000)
    assert may(objects, "Ingress", labels_of(objects, "ray-head"), PROMETHEUS, 8080)


@pytest.mark.parametrize(
    ("scenario", "who"),
    [
        ("minimal", GATEWAY),  # by default
        ("environment-staging", GATEWAY),
        ("environment-production", GATEWAY),
        ("postgres-ha", INGRESS),
    ],
)
def test_gateway_or_ingress_controller_and_test_pod_reach_the_controllers(scenario: str, who: Peer) -> None:
    objects = render(values_of(scenario))

    assert may(objects, "Ingress", labels_of(objects, "Deployment/ngd-controller"), who, 8000)
    assert connects(objects, "Pod/ngd-test", "Deployment/ngd-controller", 8000)


def test_controllers_leave_for_what_they_need_and_no_further() -> None:
    database, kubernetes = ("databases", {"cnpg.io/cluster": "postgres"}), ("default", {"component": "apiserver"})
    shared, own, alone = (render(values_of(name)) for name in ("postgres-ha", "kuberay-gpu-rdma", "minimal"))
    controller = labels_of(alone, "Deployment/ngd-controller")

    assert may(shared, "Egress", controller, database, 5432)
    assert may(own, "Egress", controller, kubernetes, 6443)
    assert not may(shared, "Egress", controller, kubernetes, 6443)
    assert not may(alone, "Egress", controller, database, 5432)
    assert not may(own, "Egress", labels_of(own, "ray-head"), kubernetes, 6443)


def test_an_existing_ray_head_is_reached_on_its_port() -> None:
    objects = render(values_of("existing-ray"))
    controller = labels_of(objects, "Deployment/ngd-controller")

    assert may(objects, "Egress", controller, ("ray", {"ray.io/node-type": "head"}), 8265)
    assert may(objects, "Ingress", controller, ("ray", {"ray.io/node-type": "worker"}), 8000)


def test_policies_can_be_left_to_somebody_else() -> None:
    objects = render({"networkPolicy": {"enabled": False}})

    assert not any(one["kind"] == "NetworkPolicy" for one in objects)
