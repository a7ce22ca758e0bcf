"""An upgrade changes nothing that Kubernetes refuses to change; test_install.py has Helm do one."""

import shutil
from pathlib import Path

import pytest
import yaml

from tests.support.chart import CHART, GOLDEN, SCENARIO, Object, only, render, values_of


def golden(scenario: str) -> list[Object]:
    """What the last committed version of the chart rendered to."""
    return list(yaml.safe_load_all((GOLDEN / f"{scenario}.yaml").read_text()))


def immutable(objects: list[Object]) -> dict[str, object]:
    """Returns what cannot be changed in place: selectors, and the shape of a claim."""
    found: dict[str, object] = {}
    for one in objects:
        name = f"{one['kind']}/{one['metadata']['name']}"
        if one["kind"] == "Deployment":
            found[name] = one["spec"]["selector"]
        elif one["kind"] == "PersistentVolumeClaim":
            found[name] = (one["spec"]["accessModes"], one["spec"].get("storageClassName"))
        elif one["kind"] == "RoleBinding":
            found[name] = one["roleRef"]
    return found


@SCENARIO
def test_nothing_immutable_changes_with_the_chart(scenario: str, tmp_path: Path) -> None:
    later = changed_chart(tmp_path, "Chart.yaml", "version: 0.1.0", "version: 0.9.9")
    text = (later / "Chart.yaml").read_text().replace('appVersion: "0.1.0"', 'appVersion: "0.9.9"')
    (later / "Chart.yaml").write_text(text)

    after = immutable(render(values_of(scenario), chart=later))

    assert after == immutable(golden(scenario))


@pytest.mark.parametrize(
    ("before", "after"),
    [("environment-staging", "environment-production"), ("postgres-ha", "kuberay-gpu-rdma")],
)
def test_nothing_immutable_changes_between_dispatchers(before: str, after: str) -> None:
    """Values of a release are edited; what remains of it must be accepted. Claims of another class are other claims."""
    old, new = immutable(render(values_of(before))), immutable(render(values_of(after)))

    for name in old.keys() & new.keys():
        if not name.startswith("PersistentVolumeClaim"):
            assert old[name] == new[name]


def test_more_replicas_change_no_selector() -> None:
    values = values_of("postgres-ha")
    more = values | {"controller": values["controller"] | {"replicas": 5}}

    assert immutable(render(more)) == immutable(render(values))


def test_two_installations_have_different_secrets() -> None:
    values = {"dispatcher": {"mode": "kuberay"}}
    first, second = render(values), render(values)

    for name in ("-api-keys", "-signing-key", "-ray-auth"):
        assert only(first, "Secret", name)["data"] != only(second, "Secret", name)["data"]


def test_generated_secrets_are_what_the_service_takes() -> None:
    import base64

    objects = render({"dispatcher": {"mode": "kuberay"}})

    def value(name: str, key: str) -> str:
        return base64.b64decode(only(objects, "Secret", name)["data"][key]).decode()

    assert len(value("-api-keys", "first")) >= 20
    assert len(bytes.fromhex(value("-signing-key", "key"))) == 32
    assert len(value("-ray-auth", "auth_token")) >= 32


def test_volumes_and_what_running_attempts_need_outlive_the_release() -> None:
    objects = render({"dispatcher": {"mode": "kuberay"}})

    kept = {
        one["metadata"]["name"]
        for one in objects
        if "helm.sh/resource-policy" in one["metadata"].get("annotations", {})
    }

    assert kept == {"ngd-home", "ngd-runs", "ngd-signing-key", "ngd-ray-auth"}


def test_a_changed_ray_template_restarts_the_controllers() -> None:
    values = values_of("airgap")
    changed = values | {"rayCluster": values["rayCluster"] | {"env": {"NCCL_DEBUG": "INFO"}}}

    sums = [
        only(render(given), "Deployment")["spec"]["template"]["metadata"]["annotations"]["checksum/config"]
        for given in (values, changed)
    ]

    assert sums[0] != sums[1]


def changed_chart(folder: Path, file: str, old: str, new: str) -> Path:
    copy = folder / "ngd"
    shutil.copytree(CHART, copy)
    text = (copy / file).read_text()
    assert old in text
    (copy / file).write_text(text.replace(old, new))
    return copy
