"""deploy/kind, as far as it goes without a cluster: its script is sound, its values fit the chart and the images."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import ngd_dist
from tests.support import ROOT
from tests.support.chart import CHART

FOLDER = ROOT / "deploy" / "kind"
SCRIPT = FOLDER / "up.sh"
VERSION = ngd_dist.__version__
MODES = {
    "kuberay": {"dispatcher": {"mode": "kuberay"}},
    "ray_jobs": {"dispatcher": {"mode": "ray_jobs"}, "rayCluster": {"enabled": True}},
}


def merged(values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    both = dict(values)
    for name, value in more.items():
        both[name] = merged(values.get(name, {}), value) if isinstance(value, dict) else value
    return both


def rendered(mode: str) -> list[dict[str, Any]]:
    """Returns the chart's objects with the values of kind."""
    helm_python = pytest.importorskip(
        "helm_python", reason="no helm-python-sdk, so the values of kind are not rendered"
    )
    values = merged(yaml.safe_load((FOLDER / "values.yaml").read_text()), MODES[mode])
    with helm_python.Chart.load(str(CHART)) as chart:
        files = chart.render(values, name="ngd", namespace="ngd")
    texts = (text for name, text in files.items() if name.endswith(".yaml"))
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


@pytest.mark.parametrize("path", [SCRIPT, ROOT / "deploy" / "compose" / "secrets.sh"], ids=lambda path: path.name)
def test_scripts_are_sound(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip(f"no shellcheck, so {path.name} is checked by bash -n alone: make image-tools")
    subprocess.run(["shellcheck", path], check=True)


@pytest.mark.parametrize(
    ("environment", "arguments", "words"),
    [
        ({"MODE": "local"}, [], "MODE must be kuberay or ray_jobs, got 'local'"),
        ({}, [], "no docker; install it first"),
    ],
)
def test_says_what_is_wrong_before_it_does_anything(
    tmp_path: Path, environment: dict[str, str], arguments: list[str], words: str
) -> None:
    for tool in ("dirname", "sed"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    command = [str(shutil.which("bash")), SCRIPT, *arguments]
    result = subprocess.run(
        command, env={"PATH": str(tmp_path)} | environment, capture_output=True, text=True, check=False
    )

    assert result.returncode != 0
    assert words in result.stderr


def test_files_and_names_in_the_script_exist() -> None:
    script = SCRIPT.read_text()
    cluster = yaml.safe_load((FOLDER / "cluster.yaml").read_text())
    volume, claim = yaml.safe_load_all((FOLDER / "runs.yaml").read_text())

    assert all(
        (ROOT / path).exists() for path in re.findall(r"\b(?:deploy/kind|workers/ngd_workers/recipes)/[\w.]+", script)
    )
    assert f"CLUSTER={cluster['name']} " in script
    assert [node["role"] for node in cluster["nodes"]] == ["control-plane"]
    assert volume["spec"]["hostPath"]["path"] in script
    assert volume["spec"]["claimRef"] == {key: claim["metadata"][key] for key in ("namespace", "name")}
    assert volume["spec"]["accessModes"] == claim["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.skipif(not CHART.is_dir(), reason="helm/ngd is not here, so the values of kind are not rendered")
@pytest.mark.parametrize("mode", MODES)
def test_chart_takes_the_values_and_the_loaded_images(mode: str) -> None:
    objects = rendered(mode)
    text = yaml.safe_dump_all(objects)
    named = {f"{item['kind']}/{item['metadata']['name']}" for item in objects}

    assert set(re.findall(r"image: ([\w.:-]+)", text)) == {f"ngd-service:{VERSION}", f"ngd-worker:{VERSION}-cpu"}
    assert set(re.findall(r"claimName: ([\w-]+)", text)) == {"ngd-home", "ngd-runs"}
    assert {"Deployment/ngd-controller", "Service/ngd-controller"} <= named  # what up.sh calls
    assert "/etc/ngd/api-keys" in text
    assert "ngd-people" in text
