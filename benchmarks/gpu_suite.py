"""Runs everything that needs one GPU, in under ten minutes, and makes one table. Without a GPU it says so and ends.

The suite imports torch, torchvision, timm and pydantic alone, so that a machine without this project's environment can
run it; the oracles need pytest too. Parts run in the order of their importance; each gets the time that is left.

    python -m benchmarks.gpu_suite
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.record import folder_for, write
from ngd_dist import NGD, NGDConfig
from ngd_dist.config import AllReduce, FixedInterval

ROOT = Path(__file__).parent.parent
BUDGET_S = 570.0
DATA_DIR = os.environ.get("NGD_DATA_DIR", "data")
ORACLES = ["pytest", "-q", "-c", os.devnull, "--rootdir", str(ROOT), "-k", "cuda", "tests/ngd_dist/test_cuda.py"]


def parts(hardware: str) -> dict[str, list[str]]:
    """Returns the arguments of `python -m` for each part, by name."""
    on_gpu = ["--device", "cuda"]
    return {
        "oracles": ORACLES,
        "one NCCL rank": ["benchmarks.gpu_suite", "--nccl"],
        "step overhead": ["benchmarks.step_overhead", *on_gpu, "--hardware", hardware],
        "crossover of inversions": ["benchmarks.crossover", *on_gpu],
        "Imagenette": ["benchmarks.imagenette", *on_gpu, "--data-dir", DATA_DIR, "--hardware", hardware],
        "rungs of inversion": ["benchmarks.inversion", *on_gpu, "--hardware", hardware],
    }


def run_part(arguments: list[str], left_s: float) -> tuple[str, str]:
    """Returns the ending of a part ("ok", "failed", "out of time", "not here") and the last lines of its output."""
    if importlib.util.find_spec(arguments[0]) is None:
        return "not here", f"{arguments[0]} is not importable"
    if left_s <= 0:
        return "out of time", ""
    try:
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=ROOT, timeout=left_s, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        return "out of time", (error.stdout or b"").decode(errors="replace")
    return ("ok" if done.returncode == 0 else "failed"), done.stdout


def run(hardware: str, budget_s: float = BUDGET_S) -> dict[str, Any]:
    """Returns a row for each part: its ending, its seconds, and its output."""
    start, rows = time.perf_counter(), []
    for name, arguments in parts(hardware).items():
        began = time.perf_counter()
        ending, printed = run_part(arguments, budget_s - (began - start))
        rows.append({"part": name, "ending": ending, "seconds": time.perf_counter() - began, "printed": printed})
        print(f"{name}: {ending}, {rows[-1]['seconds']:.0f} s", flush=True)
    return {"rows": rows}


def table(result: dict[str, Any]) -> str:
    lines = ["# The GPU's set", "", "| part | ending | seconds |", "|---|---|---|"]
    lines += [f"| {row['part']} | {row['ending']} | {row['seconds']:.0f} |" for row in result["rows"]]
    for row in result["rows"]:
        lines += ["", f"## {row['part']}", "", "```text", *row["printed"].strip().splitlines()[-60:], "```"]
    return "\n".join(lines)


def train_on_one_rank(backend: str, device: str, steps: int = 3) -> dict[str, float]:
    """Returns by engine the loss after training through the collectives of a group of one rank; all are equal."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/group", rank=0, world_size=1)
        try:
            return {engine: _train(device, steps, wrap) for engine, wrap in ENGINES.items()}
        finally:
            dist.destroy_process_group()


# DeepSpeed is not among the packages of a machine without this project's environment.
ENGINES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bare": lambda model: model,
    "DDP": DistributedDataParallel,
    "FSDP2": fully_shard,
}


def _train(device: str, steps: int, wrap: Callable[[nn.Module], nn.Module]) -> float:
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).to(device)
    model = wrap(bare)
    x, y = torch.randn(32, 3, 8, 8, device=device), torch.randint(4, (32,), device=device)
    optimizer = NGD(model, NGDConfig(strategy=AllReduce(), staleness=FixedInterval(), lr=0.01))
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return F.cross_entropy(model(x), y).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="gpu", help="last word in the names of the results' folders")
    parser.add_argument("--nccl", action="store_true", help="only train on a group of one NCCL rank")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: the GPU's set did not run; run it on a machine with one")
    elif arguments.nccl:
        losses = train_on_one_rank("nccl", "cuda")
        print(f"losses after three steps on one NCCL rank: {losses}")
        if max(losses.values()) - min(losses.values()) > 1e-4:
            raise SystemExit("the engines differ")
    else:
        result = run(arguments.hardware)
        write(folder_for("gpu-suite", arguments.hardware), result, table(result))
        print(table(result))
        if any(row["ending"] == "failed" for row in result["rows"]):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
