"""The chart, the service and the images mean the same by a name, a path, a port and a version."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import ngd_dist
from ngd_service.dispatchers.rayjob import groups_of, read_template, replicas_for
from ngd_service.settings import ClientSettings, load_settings, settings_class
from ngd_workers.contract.spec import Resources
from tests.support.chart import (
    CHART,
    ROOT,
    SCENARIO,
    containers,
    only,
    pod_templates,
    ray_cluster_specs,
    ray_job_template,
    render,
    values_of,
)

RUNS, DATA = "/var/lib/ngd/runs", "/var/lib/ngd/data"
NOT_OURS = {"HOME", "PGPASSWORD", "PGSSLMODE", "PGSSLROOTCERT"}  # Python's and libpq's
ALL_SETTINGS: dict[str, Any] = {
    "settings": {
        "maxRunningJobs": 3,
        "tickSeconds": 0.5,
        "leaseSeconds": 20,
        "retryBackoffSeconds": 0,
        "maxFailedStarts": 5,
        "startBackoffSeconds": 30,
        "cancelGraceSeconds": 60,
        "interruptGraceSeconds": 15,
        "unreachableSeconds": 900,
    }
}


def environment(objects: list[dict[str, Any]], name: str = "Deployment/ngd-controller") -> dict[str, Any]:
    container = pod_templates(objects)[name]["spec"]["containers"][0]
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in container["env"]}


@SCENARIO
def test_every_variable_is_a_setting_of_the_service(scenario: str) -> None:
    given = environment(render(values_of(scenario) | ALL_SETTINGS))

    known = {f"NGD_{field.upper()}" for field in (*settings_class().model_fields, *ClientSettings.model_fields)}
    assert set(given) - known - NOT_OURS == set()


@SCENARIO
def test_the_service_accepts_the_settings(scenario: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(render(values_of(scenario) | ALL_SETTINGS)).items():
        if name.startswith("NGD_"):
            monkeypatch.setenv(name, value if isinstance(value, str) else "postgresql://from:a-secret@host/ngd")

    settings = load_settings()

    assert settings.lease_s == 20
    assert settings.max_running_jobs == 3
    assert settings.host == "0.0.0.0"


def test_a_setting_that_is_not_given_is_the_services_to_choose() -> None:
    given = environment(render({}))

    assert {name for name in given if name.endswith("_S")} == set()
    assert "NGD_DATABASE_URL" not in given


def test_numbers_are_written_as_the_service_reads_them() -> None:
    given = environment(render({"settings": {"maxRunningJobs": 1000000, "leaseSeconds": 2.5}}))

    assert (given["NGD_MAX_RUNNING_JOBS"], given["NGD_LEASE_S"]) == ("1000000", "2.5")


def test_a_pod_of_ipv6_reaches_itself() -> None:
    assert environment(render({"controller": {"host": "::"}}))["NGD_WORKER_URL"] == "http://[::1]:8000"


def test_password_reaches_postgresql_outside_the_url() -> None:
    given = environment(render(values_of("postgres-ha")))

    assert given["NGD_DATABASE_URL"] == "postgresql://ngd@postgres-rw.databases.svc:5432/ngd"
    assert given["PGPASSWORD"] == {"secretKeyRef": {"name": "ngd-database", "key": "password"}}
    assert given["PGSSLMODE"] == "verify-full"


@SCENARIO
def test_files_that_variables_name_are_mounted(scenario: str) -> None:
    objects = render(values_of(scenario))
    container = only(objects, "Deployment", "-controller")["spec"]["template"]["spec"]["containers"][0]
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    read_by_workers = {"NGD_SECRETS_DIR"}

    for name, value in environment(objects).items():
        if (
            name not in read_by_workers
            and isinstance(value, str)
            and value.startswith(("/etc/ngd/", "/var/lib/ngd", "/tmp"))
        ):
            assert any(value == path or value.startswith(f"{path}/") for path in mounted), name


@SCENARIO
def test_migration_sees_what_the_controller_sees(scenario: str) -> None:
    for name, pod in pod_templates(render(values_of(scenario))).items():
        if name.startswith("Deployment/"):
            migrate, serve = containers(pod)
            assert (migrate["args"], serve["args"]) == (["migrate"], ["serve"])
            for field in ("image", "env", "volumeMounts", "securityContext", "command"):
                assert migrate[field] == serve[field]


@SCENARIO
def test_runs_and_data_lie_at_the_same_path_in_every_pod(scenario: str) -> None:
    pods = pod_templates(render(values_of(scenario)))
    shared = [pod for name, pod in pods.items() if name != "Pod/ngd-test"]

    claims = set()
    for pod in shared:
        volumes = {volume["name"]: volume.get("persistentVolumeClaim", {}) for volume in pod["spec"]["volumes"]}
        mounts = {mount["mountPath"]: mount for mount in pod["spec"]["containers"][-1]["volumeMounts"]}
        runs, data = mounts.get(RUNS), mounts.get(DATA)
        assert data is None or data["readOnly"]
        claims.add(tuple(volumes[mount["name"]]["claimName"] if mount else None for mount in (runs, data)))
    assert len(claims) == 1


@SCENARIO
def test_rays_pods_and_controllers_share_one_token(scenario: str) -> None:
    objects = render(values_of(scenario))
    pod = only(objects, "Deployment", "-controller")["spec"]["template"]["spec"]
    mounted = {volume["name"]: volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}

    for spec in ray_cluster_specs(objects):
        assert spec["authOptions"]["mode"] == "token"
        if values_of(scenario)["dispatcher"]["mode"] == "ray_jobs":
            assert mounted["ray-auth"] == spec["authOptions"]["secretName"]
    made = {one["metadata"]["name"] for one in objects if one["kind"] == "Secret"}
    given = {"ngd-ray-token", "ngd-ray-auth", "ray-token"}
    assert {spec["authOptions"]["secretName"] for spec in ray_cluster_specs(objects)} <= made | given


def test_controllers_find_the_head_by_the_name_that_kuberay_gives_its_service() -> None:
    objects = render(values_of("postgres-ha"), release="x" * 53)

    cluster = only(objects, "RayCluster")["metadata"]["name"]
    (pod,) = (pod for name, pod in pod_templates(objects).items() if name.startswith("Deployment/"))
    given = {one["name"]: one.get("value") for one in pod["spec"]["containers"][0]["env"]}
    assert given["NGD_RAY_ADDRESS"] == f"http://{cluster}-head-svc.ngd.svc:8265"


@SCENARIO
def test_workers_report_to_a_service_that_exists(scenario: str) -> None:
    objects = render(values_of(scenario))
    url = environment(objects)["NGD_WORKER_URL"]
    service = only(objects, "Service", "-controller")

    assert url in {f"http://{service['metadata']['name']}.ngd.svc:8000", "http://127.0.0.1:8000"}
    assert (url == "http://127.0.0.1:8000") == ("NGD_RUNS_DIR" not in environment(objects))
    pod = only(objects, "Deployment", "-controller")["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= pod.items()


def test_pages_of_a_separate_dashboard_and_the_api_take_their_own_ways() -> None:
    by_ingress = values_of("environment-production") | {"ingress": {"enabled": True, "host": "ngd.example.com"}}
    rules = only(render(by_ingress), "Ingress")["spec"]["rules"][0]["http"]["paths"]
    route = only(render(values_of("kuberay-gpu-rdma")), "HTTPRoute")["spec"]["rules"]

    assert [(one["path"], one["backend"]["service"]["name"]) for one in rules] == [
        ("/api", "ngd-controller"),
        ("/", "ngd-dashboard"),
    ]
    assert [(one["matches"][0]["path"]["value"], one["backendRefs"][0]["name"]) for one in route] == [
        ("/api", "ngd-controller"),
        ("/", "ngd-dashboard"),
    ]


def test_nginx_keeps_a_browser_on_one_of_several_controllers() -> None:
    annotations = only(render(values_of("postgres-ha")), "Ingress")["metadata"]["annotations"]

    assert annotations["nginx.ingress.kubernetes.io/affinity"] == "cookie"
    assert annotations["nginx.ingress.kubernetes.io/proxy-read-timeout"] == "3600"
    assert annotations["cert-manager.io/cluster-issuer"] == "letsencrypt"


@SCENARIO
def test_one_controller_is_recreated_and_several_roll(scenario: str) -> None:
    values, objects = values_of(scenario), render(values_of(scenario))
    rolls = values.get("database", {}).get("type") == "postgres"
    spec = only(objects, "Deployment", "-controller")["spec"]

    assert spec["strategy"]["type"] == ("RollingUpdate" if rolls else "Recreate")
    several = spec["replicas"] > 1
    assert ("PodDisruptionBudget" in {one["kind"] for one in objects}) == several
    assert ("topologySpreadConstraints" in spec["template"]["spec"]) == several


def test_autoscaled_controllers_leave_their_number_to_the_autoscaler() -> None:
    values = values_of("postgres-ha")
    objects = render(values | {"controller": {"autoscaling": {"enabled": True, "maxReplicas": 6}}})

    assert "replicas" not in only(objects, "Deployment")["spec"]
    assert only(objects, "HorizontalPodAutoscaler")["spec"]["maxReplicas"] == 6


@pytest.mark.parametrize("workers", [1, 5, 16])
def test_controller_fills_the_rayjob_in(workers: int, tmp_path: Path) -> None:
    template = tmp_path / "rayjob.yaml"
    template.write_text(yaml.safe_dump(ray_job_template(render(values_of("environment-production")))))

    resources = Resources(workers=workers, gpus_per_worker=1, threads_per_worker=8)
    group, pods = replicas_for(groups_of(read_template(template)), resources)

    assert (group.name, group.gpus, pods) == ("h100", 8, -(-workers // 8))


def test_versions_are_the_projects() -> None:
    project = ngd_dist.__version__
    lock = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    assert chart["appVersion"] == project
    assert re.fullmatch(r"\d+\.\d+\.\d+", chart["version"])
    assert values["rayCluster"]["rayVersion"] == next(one["version"] for one in lock if one["name"] == "ray")
