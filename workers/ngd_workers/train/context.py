"""The surroundings of the training loop on one rank: under Ray, under torchrun or in one process."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import ngd_dist
from ngd_dist.distributed.comm import Communicator
from ngd_workers.contract.errors import SpecError
from ngd_workers.contract.spec import Resources
from ngd_workers.report.reporter import Reporter

__all__ = ["TrainContext", "commit", "device_name", "device_of", "versions"]


@dataclass(frozen=True, slots=True)
class TrainContext:
    """One rank's place in an attempt."""

    comm: Communicator
    device: torch.device
    run_dir: Path
    data_dir: Path | None
    attempt: int
    reporter: Reporter
    is_told_to_end: Callable[[], bool] = lambda: False  # by a signal to this process


def device_of(resources: Resources) -> torch.device:
    """Returns this process's device; with GPUs, the one of its local rank. Raises: SpecError."""
    if resources.gpus_per_worker == 0:
        return torch.device("cpu")
    local_rank = dist.get_node_local_rank(fallback_rank=0)
    if local_rank >= torch.cuda.device_count():
        raise SpecError(
            f"resources.gpus_per_worker is {resources.gpus_per_worker}, but this machine shows "
            f"{torch.cuda.device_count()} GPUs to rank {local_rank} of its workers; use 0 or fewer workers"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def device_name(device: torch.device) -> str:
    """Returns the GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def versions() -> dict[str, str]:
    """Returns the versions of the software on which a result depends."""
    from importlib.metadata import version

    return {"python": sys.version.split()[0], "torch": torch.__version__, "ngd_dist": version("ngd-dist")}


def commit() -> str | None:
    """Returns the git commit of the code, None outside a checkout."""
    folder = Path(ngd_dist.__file__).parent
    try:
        head = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() or None
