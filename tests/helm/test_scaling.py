"""Numbers that another hand than Helm's sets survive upgrades, by Helm 3's merge and by Helm 4's server-side apply."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.kube.field_managers import ConflictError, update
from tests.fakes.kube.helm_cluster import HelmCluster
from tests.support.chart import Object, values_of

STAGING = values_of("environment-staging") | {"httpRoute": {"enabled": False}}
LATER = STAGING | {"settings": {"maxRunningJobs": 7}}
RAY, CONTROLLERS = ("rayclusters", "ngd-ray"), ("deployments", "ngd-controller")
GROUPS = ("spec", "workerGroupSpecs")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[HelmCluster]:
    with HelmCluster(tmp_path) as one:
        yield one


def scale_workers(cluster: HelmCluster, number: int) -> None:
    """As Ray's autoscaler does, by a JSON patch; the list has no keys, so it is the owner of all of it afterwards."""
    groups = copy.deepcopy(cluster.objects[RAY]["spec"]["workerGroupSpecs"])
    groups[0] |= {"replicas": number, "scaleStrategy": {"workersToDelete": ["ngd-ray-workers-abcde"]}}
    cluster.objects[RAY] = update(cluster.objects[RAY], GROUPS, groups, "ray-autoscaler")


def scale_controllers(cluster: HelmCluster, number: int) -> None:
    """As the HorizontalPodAutoscaler does."""
    path = ("spec", "replicas")
    cluster.objects[CONTROLLERS] = update(cluster.objects[CONTROLLERS], path, number, "kube-controller-manager")


def workers(cluster: HelmCluster) -> Object:
    found: Object = cluster.objects[RAY]["spec"]["workerGroupSpecs"][0]
    return found


def controllers(cluster: HelmCluster) -> int:
    return int(cluster.objects[CONTROLLERS]["spec"]["replicas"])


def with_hpa(values: dict[str, Any], **controller: object) -> dict[str, Any]:
    autoscaling = {"enabled": True, "minReplicas": 2, "maxReplicas": 9}
    return values | {"controller": values.get("controller", {}) | controller | {"autoscaling": autoscaling}}


@pytest.mark.parametrize("number", [3, 4])
def test_helm_3_leaves_the_number_of_workers_to_rays_autoscaler(cluster: HelmCluster, number: int) -> None:
    cluster.helm("install", STAGING)
    scale_workers(cluster, number)

    cluster.helm("upgrade", LATER | {"workerImage": {"tag": "0.2.0-cpu"}})  # it sends the whole list of groups

    assert workers(cluster)["replicas"] == number
    assert workers(cluster)["scaleStrategy"] == {"workersToDelete": ["ngd-ray-workers-abcde"]}


def test_workers_that_were_scaled_to_none_stay_away(cluster: HelmCluster) -> None:
    groups = [{"name": "workers", "replicas": 2, "minReplicas": 0, "maxReplicas": 4}]
    values = STAGING | {"rayCluster": STAGING["rayCluster"] | {"workerGroups": groups}}
    cluster.helm("install", values)
    scale_workers(cluster, 0)

    cluster.helm("upgrade", values)

    assert workers(cluster)["replicas"] == 0


def test_helm_4_upgrades_what_rays_autoscaler_has_changed(cluster: HelmCluster) -> None:
    cluster.apply(cluster.manifest(STAGING))
    scale_workers(cluster, 3)

    cluster.apply(cluster.manifest(LATER))

    assert workers(cluster)["replicas"] == 3


def test_helm_4_with_force_conflicts_changes_the_pods_and_not_their_number(cluster: HelmCluster) -> None:
    cluster.apply(cluster.manifest(STAGING))
    scale_workers(cluster, 3)
    changed = STAGING | {"workerImage": {"tag": "0.2.0-cpu"}}

    manifest = cluster.manifest(changed)
    with pytest.raises(ConflictError, match=r'conflict with "ray-autoscaler": \.spec\.workerGroupSpecs'):
        cluster.apply(manifest)
    cluster.apply(manifest, force=True)

    assert workers(cluster)["replicas"] == 3
    assert workers(cluster)["template"]["spec"]["containers"][0]["image"].endswith(":0.2.0-cpu")


def test_number_of_workers_is_the_values_where_nothing_scales_them(cluster: HelmCluster) -> None:
    fixed = STAGING | {"rayCluster": STAGING["rayCluster"] | {"autoscaling": {"enabled": False}}}
    cluster.helm("install", fixed)
    scale_workers(cluster, 3)

    cluster.helm("upgrade", fixed | {"workerImage": {"tag": "0.2.0-cpu"}})

    assert workers(cluster)["replicas"] == 1


@pytest.mark.parametrize("is_helm_4", [False, True])
def test_turning_the_autoscaler_of_controllers_on_keeps_their_number(cluster: HelmCluster, is_helm_4: bool) -> None:
    five = STAGING | {"controller": {"replicas": 5}}
    put = send_with_helm_4 if is_helm_4 else send_with_helm_3
    put(cluster, five)
    assert controllers(cluster) == 5

    put(cluster, with_hpa(five))
    assert controllers(cluster) == 5
    put(cluster, with_hpa(five))
    assert controllers(cluster) == 5
    scale_controllers(cluster, 7)
    put(cluster, with_hpa(five))
    put(cluster, with_hpa(five))

    assert controllers(cluster) == 7


def test_helm_4_rolls_back_to_what_it_sent_when_the_autoscaler_had_the_number(cluster: HelmCluster) -> None:
    cluster.apply(cluster.manifest(with_hpa(STAGING)))
    scale_controllers(cluster, 4)
    steady = cluster.manifest(with_hpa(STAGING))
    cluster.apply(steady)
    scale_controllers(cluster, 6)
    cluster.apply(cluster.manifest(with_hpa(LATER)))

    cluster.apply(steady)

    assert controllers(cluster) == 6


def send_with_helm_3(cluster: HelmCluster, values: dict[str, Any]) -> None:
    cluster.helm("upgrade --install", values)


def send_with_helm_4(cluster: HelmCluster, values: dict[str, Any]) -> None:
    cluster.apply(cluster.manifest(values))


@pytest.mark.parametrize(
    ("api", "values", "sentence"),
    [
        (
            "gateway.networking.k8s.io/v1",
            {"httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}]}},
            "this cluster does not know gateway.networking.k8s.io/v1: install the Gateway API's CRDs",
        ),
        (
            "ray.io/v1",
            {"dispatcher": {"mode": "ray_jobs"}, "rayCluster": {"enabled": True}},
            "this cluster does not know ray.io/v1: install KubeRay",
        ),
    ],
)
def test_kind_that_the_cluster_does_not_know_is_refused_with_a_sentence(
    tmp_path: Path, api: str, values: dict[str, Any], sentence: str
) -> None:
    with HelmCluster(tmp_path, without=(api,)) as cluster, pytest.raises(AssertionError, match=sentence):
        cluster.helm("install", values)
    with HelmCluster(tmp_path) as cluster:
        cluster.helm("install", values)
