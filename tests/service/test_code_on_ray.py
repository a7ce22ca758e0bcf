"""A folder of code on a given Ray cluster, whose processes share no folder with the client but the volume of runs."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.own_code import RAISES, users_folder, write
from tests.support.ray_head import RayHead
from tests.support.service_process import ServiceProcess

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TRAINING_S = 120


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


def test_two_nodes_of_a_ray_cluster_train_a_shipped_folder(
    start_service: Callable[..., ServiceProcess], cluster: RayHead, tmp_path: Path
) -> None:
    secrets_dir = write(tmp_path / "secrets", {"hub": "c0rrect-horse"})
    service = start_service(
        dispatcher="ray_jobs",
        ray_address=cluster.address,
        ray_token_file=str(cluster.token_file),
        driver_command=[sys.executable, "-m", "ngd_workers.launch"],
        secrets_dir=str(secrets_dir),
    )
    folder = users_folder(tmp_path / "theirs")
    spec = (folder / "job.yaml").read_text() + "secrets: {TOKEN: hub}\nresources: {workers: 2}\n"

    shipment = service.client.ship(spec, folder)
    ended = service.client.wait(service.client.submit(shipment.spec).id, timeout_s=TRAINING_S)

    assert (ended.status.phase, ended.status.attempt) == ("SUCCEEDED", 1), ended.status.message
    run_dir = service.home / "runs" / ended.id
    code = run_dir / "attempts" / "1" / "code"
    assert all(f"in {code} with plain and 13 characters" in service.client.logs(ended.id, rank=rank) for rank in (0, 1))
    assert [path for path in run_dir.rglob("*") if path.is_file() and b"c0rrect" in path.read_bytes()] == []
