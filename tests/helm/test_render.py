"""What the chart renders to, scenario by scenario: the same with Helm 3 and Helm 4, and what was agreed on."""

import json
import re
import subprocess
import sys
from pathlib import Path

import helm_python
import pytest
import yaml

from helm.values_table import described
from helm.values_table import main as values_table
from tests.support.chart import (
    CHART,
    GOLDEN,
    HELM3,
    MONITORING,
    ROOT,
    SCENARIO,
    VALUES,
    comparable,
    containers,
    golden_text,
    kinds,
    notes,
    only,
    pod_templates,
    ray_cluster_specs,
    render,
    render_with_helm3,
    tool,
    values_of,
)

OTHER_VALUES = sorted((ROOT / "deploy").glob("*/*values*.yaml"))  # kind's
YAML_STYLE = {
    "extends": "default",
    "rules": {
        "line-length": {"max": 160},
        "document-start": "disable",
        "braces": {"max-spaces-inside": 1},
        "comments": {"min-spaces-from-content": 1},
    },
}
MAX_NAME = 63
# KubeRay puts "-head-svc" behind a cluster's name, and cuts what is longer than 50 characters from the left.
MAX_RAY_CLUSTER = 41
LABELS = {
    "helm.sh/chart",
    "app.kubernetes.io/name",
    "app.kubernetes.io/instance",
    "app.kubernetes.io/version",
    "app.kubernetes.io/component",
    "app.kubernetes.io/part-of",
    "app.kubernetes.io/managed-by",
}


@SCENARIO
def test_scenario_renders_to_its_golden(scenario: str) -> None:
    written = (GOLDEN / f"{scenario}.yaml").read_text()

    assert golden_text(render(values_of(scenario))) == written, (
        "run: python -m tests.helm.update_goldens; read the diff"
    )


@pytest.mark.parametrize("file", OTHER_VALUES, ids=lambda file: str(file.relative_to(ROOT)))
def test_values_elsewhere_in_the_repository_render(file: Path) -> None:
    values = yaml.safe_load(file.read_text())

    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(chart.merge_values(values))
    assert only(render(values), "Deployment", "-controller")


def test_every_golden_has_a_scenario() -> None:
    assert {path.stem for path in GOLDEN.glob("*.yaml")} == set(VALUES)


@SCENARIO
def test_helm_3_renders_the_same(scenario: str) -> None:
    assert comparable(render_with_helm3(values_of(scenario))) == comparable(render(values_of(scenario)))


@SCENARIO
def test_lint_finds_nothing(scenario: str) -> None:
    report = helm_python.lint(CHART, values_of(scenario), strict=True, namespace="ngd", kube_version="v1.34.0")

    assert [message for message in report["messages"] if message["severity"] >= 2] == []
    assert not report["errors"]


@SCENARIO
def test_every_object_is_labelled(scenario: str) -> None:
    for one in render(values_of(scenario)):
        assert set(one["metadata"]["labels"]) >= LABELS, one["metadata"]["name"]
        assert one["metadata"]["namespace"] == "ngd"


@SCENARIO
def test_images_are_pinned(scenario: str) -> None:
    for name, pod in pod_templates(render(values_of(scenario))).items():
        for container in containers(pod):
            tag = container["image"].rpartition("/")[2].partition("@" if "@" in container["image"] else ":")[2]
            assert tag, name
            assert tag != "latest", name


def test_own_registry_and_pull_secrets_reach_every_pod() -> None:
    pods = pod_templates(render(values_of("airgap")))

    assert {"ray-head", "ray-worker/workers", "Deployment/ngd-controller", "Pod/ngd-test"} == set(pods)
    for pod in pods.values():
        assert pod["spec"]["imagePullSecrets"] == [{"name": "registry-key"}]
        for container in containers(pod):
            assert container["image"].startswith("registry.internal:5000/ml/")
            assert "@sha256:" in container["image"]


def test_no_secret_is_made_where_all_are_given() -> None:
    assert "Secret" not in kinds(render(values_of("airgap")))


@pytest.mark.parametrize("release", ["a", "x" * 53, "team-seven-" + "y" * 42, "ngd-" + "z" * 49])
@pytest.mark.parametrize("scenario", ["kuberay-gpu-rdma", "postgres-ha", "minimal"])
def test_names_are_short_enough_and_differ(scenario: str, release: str) -> None:
    objects = render(values_of(scenario), release=release)

    names = [(one["kind"], one["metadata"]["name"]) for one in objects]
    assert len(set(names)) == len(names)
    assert max(len(name) for _, name in names) <= MAX_NAME
    for one in objects:
        assert all(len(str(value)) <= MAX_NAME for value in one["metadata"]["labels"].values())
        if one["kind"] == "RayCluster":
            assert len(one["metadata"]["name"]) <= MAX_RAY_CLUSTER


@pytest.mark.parametrize(
    ("release", "values"),
    [
        ("7th", {}),
        ("team.seven", {}),
        ("a", {"nameOverride": "n" * 50}),
        ("a", {"fullnameOverride": "f" * 60}),
    ],
)
def test_odd_names_become_names_of_services(release: str, values: dict[str, str]) -> None:
    for one in render(values | {"dispatcher": {"mode": "kuberay"}}, release=release):
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", one["metadata"]["name"])


def test_two_releases_of_one_namespace_share_no_name() -> None:
    first, second = (
        {(one["kind"], one["metadata"]["name"]) for one in render(values_of("postgres-ha"), release=release)}
        for release in ("blue", "green")
    )

    assert first & second == set()


def test_monitoring_objects_are_made_where_the_cluster_knows_them() -> None:
    values = values_of("postgres-ha")

    objects = render_with_helm3(values, apis=(MONITORING,))

    assert {"ServiceMonitor", "PodMonitor", "PrometheusRule"} <= kinds(objects)
    service = only(objects, "Service")["metadata"]["labels"]
    assert only(objects, "ServiceMonitor")["spec"]["selector"]["matchLabels"].items() <= service.items()
    for spec in ray_cluster_specs(objects):
        pods = spec["headGroupSpec"]["template"]["metadata"]["labels"]
        assert only(objects, "PodMonitor")["spec"]["selector"]["matchLabels"].items() <= pods.items()
    rules = only(objects, "PrometheusRule")["spec"]["groups"][0]["rules"]
    assert rules[0]["annotations"]["runbook_url"] == "https://wiki.example.com/ngd/NgdDown.md"


def test_monitoring_that_was_not_made_is_said() -> None:
    assert not kinds(render(values_of("postgres-ha"))) & {"ServiceMonitor", "PodMonitor", "PrometheusRule"}
    assert "NOT MADE: this cluster does not know monitoring.coreos.com/v1" in notes(values_of("postgres-ha"))


def test_notes_say_how_to_reach_it_and_how_to_read_the_key() -> None:
    text = notes({})

    assert "port-forward service/ngd-controller 8000:8000" in text
    assert "get secret ngd-api-keys -o jsonpath='{.data.first}' | base64 -d" in text
    assert "https://ngd.example.com" in notes(values_of("postgres-ha"))


def test_extra_objects_may_be_yaml_or_a_template() -> None:
    given = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "one"}}
    text = "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: {{ .Release.Name }}-two\n"

    objects = render({"extraObjects": [given, text]})

    assert only(objects, "ConfigMap", "one") == given
    assert only(objects, "ConfigMap", "-two")["metadata"]["name"] == "ngd-two"


def test_every_value_is_described() -> None:
    text = (CHART / "values.yaml").read_text()
    paths = {path for path, _ in described(text)}

    def leaves(value: object, path: tuple[str, ...]) -> list[tuple[str, ...]]:
        if path in paths or not isinstance(value, dict):
            return [path]
        return [leaf for key, inner in value.items() for leaf in leaves(inner, (*path, key))]

    assert {leaf for leaf in leaves(yaml.safe_load(text), ()) if leaf not in paths} == set()


def test_readme_has_the_current_values() -> None:
    assert values_table(["--check"]) == 0, "run: python helm/values_table.py"


def test_written_yaml_is_clean() -> None:
    files = [CHART / "values.yaml", CHART / "Chart.yaml", CHART / "ci", CHART / "files" / "alerts.yaml"]
    files += [ROOT / "deploy" / "environments", ROOT / "deploy" / "monitoring"]

    done = subprocess.run(
        [Path(sys.executable).with_name("yamllint"), "--strict", "-d", json.dumps(YAML_STYLE), *files],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout


def test_a_packed_chart_renders_the_same(tmp_path: Path) -> None:
    packed = Path(helm_python.package(CHART, destination=tmp_path))

    assert comparable(render({}, chart=packed)) == comparable(render({}))


def test_lint_of_helm_3_finds_nothing() -> None:
    done = subprocess.run(
        [tool(HELM3, "helm lint of Helm 3"), "lint", "--strict", CHART], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout
