"""What a driver says of the Ray that it trains on, with no Ray started."""

import os
from pathlib import Path

import pytest

from ngd_workers.contract.errors import RayStartError, SpecError
from ngd_workers.contract.spec import Resources
from ngd_workers.launch import ray_cluster
from ngd_workers.launch.ray_cluster import RayCluster, bundle
from tests.support.attempts import small_spec

RAYLET = """\
[2026-11-28 21:45:58,254 I 6006 6006] (raylet) main.cc:283: Setting cluster ID to: 2a29
[2026-11-28 21:46:13,254 C 6006 6006] (raylet) node_manager.cc:3557:  Check failed: Timed out waiting for file \
/tmp/ngd-x/session_1/metrics_agent_port_d625
*** StackTrace Information ***
/ray/core/src/ray/raylet/raylet(+0xc0ffee)
"""


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))  # the driver's settings are for all of its process


def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, raylet: str) -> str:
    """Returns what the driver says of a Ray that gives up as Ray does where its raylet has died."""

    def die(**options: object) -> None:
        logs = tmp_path / "session_1" / "logs"
        logs.mkdir(parents=True)
        (logs / "raylet.out").write_text(raylet)
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr("ray.init", die)
    monkeypatch.setattr(ray_cluster.tempfile, "mkdtemp", lambda **_: str(tmp_path))
    with pytest.raises(RayStartError) as error:
        RayCluster("own").start(Resources(workers=2))
    return str(error.value)


def test_raylet_s_last_word_is_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    message = start(monkeypatch, tmp_path, RAYLET)

    assert message == (
        "Ray did not start on this machine: Check failed: Timed out waiting for file "
        "/tmp/ngd-x/session_1/metrics_agent_port_d625"
    )


def test_ray_s_own_exception_is_the_reason_where_its_processes_left_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    message = start(monkeypatch, tmp_path, "")

    assert message == "Ray did not start on this machine: The current node timed out during startup."


def test_agents_are_given_their_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def init(**options: object) -> None:
        from ray._private import parameter

        seen.append(parameter.RayParams(metrics_export_port=options["_metrics_export_port"]))

    monkeypatch.setattr("ray.init", init)
    RayCluster("own").start(Resources(workers=2))

    (params,) = seen
    names = ("metrics_agent_port", "metrics_export_port", "runtime_env_agent_port", "dashboard_agent_listen_port")
    ports = [getattr(params, name) for name in names]
    assert len(set(ports)) == 4
    assert all(20_000 <= port < 32_000 for port in ports)


def test_worker_reserves_what_the_job_says() -> None:
    assert bundle(Resources(threads_per_worker=2)) == {"CPU": 2.0}
    assert bundle(Resources(gpus_per_worker=1)) == {"CPU": 1.0, "GPU": 1.0}


@pytest.mark.parametrize(("gpus", "size"), [(1, 1), (3, 2), (4, 4), (8, 4)])
def test_elastic_job_on_this_machine_has_as_many_workers_as_gpus_allow(
    monkeypatch: pytest.MonkeyPatch, gpus: int, size: int
) -> None:
    job = small_spec(resources={"min_workers": 1, "max_workers": 4, "gpus_per_worker": 1})
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 4.0, "GPU": float(gpus)}}])
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": float(gpus)})
    cluster = RayCluster("own")

    cluster.check(job)
    assert cluster.largest_size(job, lambda message: None, lambda: False) == size
    assert not cluster.changes


def test_gpus_for_the_fewest_workers_have_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    job = small_spec(resources={"min_workers": 2, "max_workers": 4, "gpus_per_worker": 1})
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": 1.0})

    with pytest.raises(SpecError) as error:
        RayCluster("own").check(job)
    assert str(error.value) == (
        "resources ask for 2 GPUs (min_workers 2 x gpus_per_worker 1), this machine has 1; lower them"
    )
