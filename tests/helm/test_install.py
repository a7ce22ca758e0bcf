"""Helm installs, upgrades and uninstalls the chart at an API server: what it looks up there, and what it leaves."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.fakes.kube.helm_cluster import HelmCluster
from tests.support.chart import CHART, VALUES, values_of

GENERATED = ("ngd-api-keys", "ngd-signing-key", "ngd-ray-auth")
KUBERAY = {"dispatcher": {"mode": "kuberay"}}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[HelmCluster]:
    with HelmCluster(tmp_path) as one:
        yield one


def secrets(cluster: HelmCluster) -> dict[str, dict[str, str]]:
    return {name: cluster.objects["secrets", name]["data"] for name in GENERATED}


def test_generated_secrets_survive_upgrades(cluster: HelmCluster) -> None:
    cluster.helm("install", KUBERAY)
    first = secrets(cluster)
    cluster.objects["secrets", "ngd-api-keys"]["data"]["alice"] = "YSBrZXkgdGhhdCB3YXMgYWRkZWQgYnkgaGFuZA=="

    cluster.helm("upgrade", KUBERAY | {"settings": {"maxRunningJobs": 5}})
    cluster.helm("upgrade", KUBERAY)

    kept = secrets(cluster)
    assert kept["ngd-api-keys"].pop("alice")
    assert kept == first


@pytest.mark.parametrize(
    "scenario",
    [pytest.param(name, marks=pytest.mark.slow if name.startswith("environment-") else ()) for name in VALUES],
)
def test_a_later_chart_upgrades_what_this_one_installed(scenario: str, cluster: HelmCluster, tmp_path: Path) -> None:
    later = tmp_path / "later"
    later.mkdir()
    for file in (path for path in CHART.rglob("*") if path.is_file()):
        copy = later / file.relative_to(CHART)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    (later / "Chart.yaml").write_text(yaml.safe_dump(chart | {"version": "9.9.9", "appVersion": "9.9.9"}))
    cluster.helm("install", values_of(scenario))
    before = set(cluster.objects)

    cluster.helm("upgrade", values_of(scenario), chart=later)

    releases = {key for key in cluster.objects if key[1].startswith("sh.helm.release")}
    assert set(cluster.objects) - releases == before - releases
    deployment = cluster.objects["deployments", "ngd-controller"]
    assert deployment["metadata"]["labels"]["app.kubernetes.io/version"] == "9.9.9"


def test_changing_an_immutable_field_would_be_noticed(cluster: HelmCluster) -> None:
    cluster.helm("install", {})

    with pytest.raises(AssertionError, match=r"spec\.selector: field is immutable"):
        cluster.helm("upgrade", {"nameOverride": "other", "fullnameOverride": "ngd"})


def test_what_uninstall_leaves_the_next_install_takes_up(cluster: HelmCluster) -> None:
    cluster.helm("install", KUBERAY)
    first = secrets(cluster)

    said = cluster.helm("uninstall")

    assert re.search("kept due to the resource policy", said)
    assert {name for _, name in cluster.objects} == {"ngd-home", "ngd-runs", "ngd-signing-key", "ngd-ray-auth"}
    cluster.helm("install", KUBERAY)
    assert secrets(cluster)["ngd-signing-key"] == first["ngd-signing-key"]
    assert secrets(cluster)["ngd-ray-auth"] == first["ngd-ray-auth"]
    assert secrets(cluster)["ngd-api-keys"] != first["ngd-api-keys"]


def test_monitoring_is_made_where_the_cluster_knows_it(cluster: HelmCluster) -> None:
    said = cluster.helm("install", values_of("postgres-ha"))

    assert cluster.names("servicemonitors") == {"ngd-controller"}
    assert cluster.names("prometheusrules") == {"ngd"}
    assert "NOT MADE" not in said
