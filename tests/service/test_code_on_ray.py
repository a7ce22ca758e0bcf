"""A folder of code on given Ray clusters, whose processes share no folder with the client but the volume of runs."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ngd_service.client.client import Client
from tests.fakes.kube.cluster import KubeCluster
from tests.service.test_crash import all_events
from tests.support.deadline import wait_until
from tests.support.own_code import RAISES, STRANGER, users_folder, write
from tests.support.ray_head import RayHead
from tests.support.service_process import NGD, ServiceProcess

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TRAINING_S = 200
DRIVER = [sys.executable, "-m", "ngd_workers.launch"]
SECRET = "c0rrect-horse"
Start = Callable[[Path], ServiceProcess]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RayHead]:
    """A head that trains nothing itself, and two nodes, each in a folder of its own that holds a stranger's code."""
    head = RayHead(num_cpus=0)
    try:
        for name in ("one", "two"):
            head.add_node(write(tmp_path / name, {"workers/__init__.py": RAISES, "utils.py": RAISES}))
        yield head
    finally:
        head.close()


@pytest.fixture
def kuberay(cluster: RayHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeCluster]:
    """KubeRay, of which each RayJob's driver finds the cluster above, as it would find that of its pods."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    kube = KubeCluster(tmp_path / "kube").start()
    monkeypatch.setenv("KUBECONFIG", str(kube.kubeconfig))
    yield kube
    kube.stop()


@pytest.fixture(params=["ray_jobs", "kuberay"])
def service(
    request: pytest.FixtureRequest, start_service: Callable[..., ServiceProcess], tmp_path: Path
) -> ServiceProcess:
    """The service that knows nothing of the user's folder, on each dispatcher in turn."""
    secrets_dir = write(tmp_path / "secrets", {"hub": SECRET})
    settings = {"driver_command": DRIVER, "secrets_dir": str(secrets_dir), "max_running_jobs": 1}
    if request.param == "kuberay":
        return start_service(**settings, **request.getfixturevalue("kuberay").settings)
    head = request.getfixturevalue("cluster")
    return start_service(
        **settings, dispatcher="ray_jobs", ray_address=head.address, ray_token_file=str(head.token_file)
    )


def ngd(service: ServiceProcess, *arguments: str, folder: Path) -> str:
    """Returns what a command says that succeeds in this folder, of a client that shares nothing with the workers."""
    folder.mkdir(exist_ok=True)
    command = [*NGD, *arguments, "--url", service.url]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=os.environ)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def succeeded(client: Client, job_id: str) -> None:
    ended = client.wait(job_id, timeout_s=TRAINING_S)
    assert (ended.status.phase, ended.status.attempt) == ("SUCCEEDED", 1), ended.status.message


def kill_a_rank(service: ServiceProcess, job_id: str) -> None:
    """Ends one of the two processes that train, as the kernel does when there is no memory left."""
    code = service.home / "runs" / job_id / "attempts" / "1" / "code"
    workers = [process for process in psutil.process_iter() if process.name().startswith("ray::")]
    ranks = [process for process in workers if _cwd_of(process) == str(code)]
    assert len(ranks) == 2, ranks
    ranks[-1].kill()


def _cwd_of(process: psutil.Process) -> str:
    try:
        return process.cwd()
    except psutil.Error:
        return ""


def test_folder_trains_on_two_nodes_and_its_weights_come_back(service: ServiceProcess, tmp_path: Path) -> None:
    client = tmp_path / "client"
    job = users_folder(tmp_path / "theirs") / "job.yaml"
    text = job.read_text() + "secrets: {TOKEN: hub}\nresources: {workers: 2}\n"
    job.write_text(text.replace("steps: 6", "steps: 1000"))

    first = ngd(service, "submit", str(job), folder=client).split()[0]
    run_dir = service.home / "runs" / first
    wait_until(lambda: list(run_dir.glob("checkpoints/step-*/*.json")), "a checkpoint", timeout_s=TRAINING_S)
    kill_a_rank(service, first)
    succeeded(service.client, first)
    twin = ngd(service, "submit", str(job), "--set", "optimizer={kind: sgd}", folder=client).split()[0]
    succeeded(service.client, twin)
    more = ngd(service, "submit", "--from", first, "--set", "schedule.steps=1100", folder=client).split()[0]
    succeeded(service.client, more)

    told = f"in {run_dir / 'attempts' / '1' / 'code'} with plain and {len(SECRET)} characters"
    assert all(told in service.client.logs(first, rank=rank) for rank in (0, 1))
    assert "workers_restarted" in {event.kind for event in all_events(service.client, first)}
    assert [path for path in run_dir.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()] == []
    compared = ngd(service, "compare", first, twin, more, folder=client)
    rows = {line.split()[0]: line.split()[1:] for line in compared.splitlines() if line.strip()}
    assert (rows["schedule.steps"], rows["optimizer.kind"]) == (["1000", "1000", "1100"], ["ngd", "sgd", "ngd"])
    ngd(service, "download", more, "-o", "weights", folder=client)
    assert (client / "weights" / "weights.safetensors").is_file()
    ngd(service, "export", more, "--format", "torchscript", "-o", "out", folder=client)
    outputs = subprocess.run(
        [sys.executable, "-P", "-c", STRANGER], cwd=client / "out", capture_output=True, text=True, check=True
    )
    assert outputs.stdout == "True\n"
