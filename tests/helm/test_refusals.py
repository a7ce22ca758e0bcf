"""Values that are wrong, alone or together, end the render with a sentence that says what to do."""

import copy
import json
import subprocess
from typing import Any

import helm_python
import pytest
import yaml

from tests.support.chart import CHART, HELM3, render, tool, values_of

POSTGRES = {"type": "postgres", "existingSecret": "url"}

TOGETHER: dict[str, tuple[dict[str, Any], str]] = {
    "two controllers on SQLite": (
        {"controller": {"replicas": 2}, "dispatcher": {"mode": "kuberay"}},
        "SQLite is one file that one controller may open, but controller.replicas is 2",
    ),
    "autoscaling on SQLite": (
        {"controller": {"autoscaling": {"enabled": True}}, "dispatcher": {"mode": "kuberay"}},
        r"SQLite is one file .*\(controller.autoscaling.enabled is true\)",
    ),
    "separate dashboard on SQLite": (
        {"dashboard": {"separate": True}, "dispatcher": {"mode": "kuberay"}},
        "dashboard.separate runs a second controller, and SQLite is one file",
    ),
    "PostgreSQL's host on SQLite": ({"database": {"host": "pg"}}, "are for PostgreSQL, and database.type is sqlite"),
    "PostgreSQL without an address": ({"database": {"type": "postgres"}}, "needs database.existingSecret"),
    "PostgreSQL without a password": ({"database": {"type": "postgres", "host": "pg"}}, "database.passwordSecret"),
    "a URL and a host": ({"database": {**POSTGRES, "host": "pg"}}, "existingSecret holds the whole URL"),
    "verification without an authority": (
        {"database": {"type": "postgres", "host": "pg", "passwordSecret": "p", "sslMode": "verify-full"}},
        "name its secret in database.caSecret",
    ),
    "two local controllers": (
        {"controller": {"replicas": 2}, "database": POSTGRES},
        "jobs are processes in the controller's own pod",
    ),
    "ray_jobs without Ray": ({"dispatcher": {"mode": "ray_jobs"}}, "ray_jobs needs a Ray cluster"),
    "two Ray clusters": (
        {"dispatcher": {"mode": "ray_jobs"}, "rayCluster": {"enabled": True}, "ray": {"address": "http://head:8265"}},
        "give one of them",
    ),
    "a Ray cluster for local jobs": ({"rayCluster": {"enabled": True}}, "dispatcher.mode=ray_jobs, got local"),
    "a Ray cluster beside kuberay": (
        {"dispatcher": {"mode": "kuberay"}, "rayCluster": {"enabled": True}},
        "kuberay makes a cluster for each attempt",
    ),
    "an address for kuberay": (
        {"dispatcher": {"mode": "kuberay"}, "ray": {"address": "http://head:8265"}},
        "ray.address is for dispatcher.mode=ray_jobs, got kuberay",
    ),
    "a token for no cluster": ({"ray": {"existingSecret": "token"}}, "ray.address, which is empty"),
    "autoscaling of an attempt": (
        {"dispatcher": {"mode": "kuberay"}, "rayCluster": {"autoscaling": {"enabled": True}}},
        "each attempt's cluster has the size of its job",
    ),
    "runs on a volume of one node": (
        {"dispatcher": {"mode": "kuberay"}, "storage": {"runs": {"accessModes": ["ReadWriteOnce"]}}},
        "must include ReadWriteMany, got ReadWriteOnce",
    ),
    "two groups of one name": (
        {"dispatcher": {"mode": "kuberay"}, "rayCluster": {"workerGroups": [{"name": "a"}, {"name": "a"}]}},
        "two groups of rayCluster.workerGroups are called a",
    ),
    "more replicas than allowed": (
        {"dispatcher": {"mode": "kuberay"}, "rayCluster": {"workerGroups": [{"name": "a", "replicas": 9}]}},
        r"replicas of a must be between minReplicas \(0\) and maxReplicas \(8\), got 9",
    ),
    "ingress without a host": ({"ingress": {"enabled": True}}, "ingress.enabled needs ingress.host"),
    "route without a gateway": ({"httpRoute": {"enabled": True}}, "needs httpRoute.parentRefs"),
    "a sleep longer than the grace": (
        {"controller": {"preStopSleepSeconds": 60}},
        r"terminationGracePeriodSeconds \(45\) must exceed controller.preStopSleepSeconds \(60\)",
    ),
    "pages spread by an unknown ingress": (
        {
            "controller": {"replicas": 2},
            "database": POSTGRES,
            "dispatcher": {"mode": "kuberay"},
            "ingress": {"enabled": True, "host": "a.b", "controller": "other"},
        },
        "a page of the dashboard lives in one controller",
    ),
    "pages spread by a route": (
        {
            "controller": {"replicas": 2},
            "database": POSTGRES,
            "dispatcher": {"mode": "kuberay"},
            "httpRoute": {"enabled": True, "parentRefs": [{"name": "gateway"}]},
        },
        "or httpRoute.sessionPersistence",
    ),
    "a variable that the chart sets": (
        {"controller": {"extraEnv": [{"name": "NGD_PORT", "value": "9"}]}},
        "controller.extraEnv sets NGD_PORT, which the chart sets",
    ),
}

ALONE: dict[str, dict[str, Any]] = {
    "tag latest": {"image": {"tag": "latest"}},
    "a tag as digest": {"image": {"digest": "v1"}},
    "no replicas": {"controller": {"replicas": 0}},
    "replicas as text": {"controller": {"replicas": "2"}},
    "a mode that is none": {"dispatcher": {"mode": "slurm"}},
    "a database that is none": {"database": {"type": "mysql"}},
    "a public URL below a path": {"controller": {"publicUrl": "https://example.com/ngd"}},
    "an address without scheme": {"ray": {"address": "head:8265"}},
    "a GPU on the head": {"rayCluster": {"head": {"resources": {"limits": {"nvidia.com/gpu": 1}}}}},
    "a group without a name": {"rayCluster": {"workerGroups": [{"replicas": 1}]}},
    "no group": {"rayCluster": {"workerGroups": []}},
    "a typo in a group": {"rayCluster": {"workerGroups": [{"name": "a", "gpuPerPod": 8}]}},
    "a quantity that is none": {"storage": {"runs": {"size": "much"}}},
    "root": {"podSecurity": {"runAsUser": 0}},
    "a number as variable": {"rayCluster": {"env": {"NCCL_IB_TIMEOUT": 1000000}}},
    "a variable from nowhere": {"rayCluster": {"env": {"TOKEN": {"secretRef": {"name": "hub"}}}}},
    "a variable from two places": {
        "rayCluster": {"head": {"env": {"TOKEN": {"secretKeyRef": {"name": "a", "key": "b"}, "fieldRef": {}}}}}
    },
    "zero seconds of lease": {"settings": {"leaseSeconds": 0}},
}


@pytest.mark.parametrize("case", TOGETHER)
def test_values_that_contradict_each_other_are_refused_with_a_sentence(case: str) -> None:
    values, sentence = TOGETHER[case]

    with pytest.raises(helm_python.HelmError, match=sentence):
        render(values)


@pytest.mark.parametrize(
    ("group", "sentence"),
    [
        ({"resourceClaims": [{"name": "gpu"}]}, "resourceClaims of a need Kubernetes 1.31 or newer, got v1.30.0"),
        ({"pack": {"mode": "required"}}, "pack.mode=required of a needs Kubernetes 1.31 or newer"),
    ],
)
def test_what_an_old_kubernetes_lacks_is_refused_there(group: dict[str, Any], sentence: str) -> None:
    helm = tool(HELM3, "Helm 3")
    values = {"dispatcher": {"mode": "kuberay"}, "rayCluster": {"workerGroups": [{"name": "a"} | group]}}
    command = [helm, "template", "ngd", CHART, "--kube-version", "1.30.0", "-f", "-"]

    done = subprocess.run(command, input=json.dumps(values), capture_output=True, text=True, check=False)

    assert sentence in done.stderr


@pytest.mark.parametrize("case", ALONE)
def test_schema_refuses_a_wrong_value(case: str) -> None:
    with pytest.raises(helm_python.HelmValuesError):
        render_checked(ALONE[case])


def every_map_of_the_schema() -> list[tuple[str, ...]]:
    """Returns the path of every map of values.yaml whose keys the schema lists."""
    schema = json.loads((CHART / "values.schema.json").read_text())

    def walk(node: dict[str, Any], path: tuple[str, ...]) -> list[tuple[str, ...]]:
        if "$ref" in node:
            node = schema["definitions"][node["$ref"].rpartition("/")[2]]
        here = [path] if node.get("additionalProperties") is False else []
        return here + [
            found for key, inner in node.get("properties", {}).items() for found in walk(inner, (*path, key))
        ]

    return walk(schema, ())


@pytest.mark.parametrize("path", every_map_of_the_schema(), ids=lambda path: ".".join(path) or "top")
def test_a_misspelt_name_is_refused_everywhere(path: tuple[str, ...]) -> None:
    values: dict[str, Any] = {}
    inner = values
    for key in path:
        inner = inner.setdefault(key, {})
    inner["misspelt"] = 1

    with pytest.raises(helm_python.HelmValuesError, match="misspelt"):
        render_checked(values)


def every_value() -> list[tuple[str, ...]]:
    """Returns the path of every value and every map of values.yaml."""

    def walk(values: dict[str, Any], path: tuple[str, ...]) -> list[tuple[str, ...]]:
        paths = [(*path, name) for name in values]
        return paths + [
            found
            for name in values
            if values[name] and isinstance(values[name], dict)
            for found in walk(values[name], (*path, name))
        ]

    return walk(yaml.safe_load((CHART / "values.yaml").read_text()), ())


def test_null_is_refused_by_name_or_leaves_nothing_behind() -> None:
    """Helm takes a value away that is null: what needs it would end in a nil pointer, or send null to Kubernetes."""
    base = {"dispatcher": {"mode": "ray_jobs"}, "rayCluster": {"enabled": True}}
    rendered = []
    for path in every_value():
        values = copy.deepcopy(base)
        inner = values
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = None
        missing = f"missing property '{path[-1]}'"
        if missing not in (refusal := refusal_of(values)):
            assert refusal == "", path
            rendered.append(path)

    assert {("settings", "leaseSeconds"), ("podSecurity", "runAsUser")} <= set(rendered)
    assert not {("networkPolicy", "ingressFrom"), ("storage", "runs", "accessModes")} & set(rendered)


def refusal_of(values: dict[str, Any]) -> str:
    """Returns what Helm says against the values; nothing if it renders them, without a null."""
    try:
        objects = render(values)
    except helm_python.HelmError as error:
        return str(error)
    return "null is rendered" if any(holds_null(one) for one in objects) else ""


def holds_null(content: object) -> bool:
    if isinstance(content, dict):
        return any(holds_null(value) for value in content.values())
    return content is None or (isinstance(content, list) and any(holds_null(value) for value in content))


def test_schema_uses_words_that_helm_3_knows_too() -> None:
    """Helm 3's validator reads draft 7 and passes over what is newer."""
    text = (CHART / "values.schema.json").read_text()

    assert json.loads(text)["$schema"] == "http://json-schema.org/draft-07/schema#"
    for newer in ("$defs", "unevaluatedProperties", "dependentRequired", "dependentSchemas", "prefixItems"):
        assert f'"{newer}"' not in text


def test_schema_has_a_place_for_every_value() -> None:
    render_checked(yaml.safe_load((CHART / "values.yaml").read_text()))


@pytest.mark.parametrize("escape", ["separate", "assumeSticky"])
def test_pages_of_several_controllers_may_be_sticky_in_two_other_ways(escape: str) -> None:
    values = copy.deepcopy(TOGETHER["pages spread by a route"][0]) | {"dashboard": {escape: True}}

    assert render(values)


def test_sticky_session_of_the_gateway_is_passed_on() -> None:
    values = values_of("kuberay-gpu-rdma") | {"dashboard": {"separate": False}}
    values["httpRoute"] |= {"sessionPersistence": {"sessionName": "ngd", "type": "Cookie"}}

    rule = next(one for one in render(values) if one["kind"] == "HTTPRoute")["spec"]["rules"][0]

    assert rule["sessionPersistence"] == {"sessionName": "ngd", "type": "Cookie"}


def render_checked(values: dict[str, Any]) -> None:
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(chart.merge_values(values))
