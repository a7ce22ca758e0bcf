"""What does one training step with SP-NGD cost beside SGD's?

Both run in this process on the same model and batch, in alternating blocks; the figure is the ratio of their means.
Three schedules: every statistic refreshed every step, every tenth step, and practically never (what applying costs).

    python -m benchmarks.step_overhead --device cuda
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.record import folder_for, write
from ngd_dist import NGD, NGDConfig
from ngd_dist.config import FixedInterval

BLOCKS, STEPS = 5, 10


def mlp() -> tuple[nn.Module, torch.Tensor]:
    widths = [784, 512, 512, 512]
    hidden = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(512, 10)), torch.randn(256, 784)


def resnet50() -> tuple[nn.Module, torch.Tensor]:
    from torchvision.models import resnet50

    return resnet50(num_classes=10), torch.randn(64, 3, 224, 224)


MODELS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {"mlp": mlp, "resnet50": resnet50}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9),
    "ngd every 1": lambda model: NGD(model, NGDConfig(lr=1e-4, damping=0.1, staleness=FixedInterval(steps=1))),
    "ngd every 10": lambda model: NGD(model, NGDConfig(lr=1e-4, damping=0.1, staleness=FixedInterval(steps=10))),
    "ngd every 1000": lambda model: NGD(model, NGDConfig(lr=1e-4, damping=0.1, staleness=FixedInterval(steps=1000))),
}


class Case:
    """One optimizer with its own copy of the model."""

    def __init__(self, model_name: str, optimizer_name: str, device: str) -> None:
        torch.manual_seed(0)
        model, x = MODELS[model_name]()
        self.model, self.x = model.to(device), x.to(device)
        self.y = torch.randint(10, (len(x),), device=device)
        self.optimizer = OPTIMIZERS[optimizer_name](self.model)
        self.seconds: list[float] = []

    def step(self) -> float:
        """Returns the seconds of one whole training step, the device's queue drained."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()
        if self.x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def measure(model_name: str, device: str) -> list[dict[str, Any]]:
    """Returns one row per optimizer: the first step, the median and spread of the later ones, the ratio to SGD."""
    cases = {name: Case(model_name, name, device) for name in OPTIMIZERS}
    first = {name: case.step() for name, case in cases.items()}
    for _ in range(BLOCKS):
        for case in cases.values():
            case.seconds += [case.step() for _ in range(STEPS)]
    # The mean spreads each refresh over the steps that it serves; the median would hide it.
    mean = {name: statistics.fmean(case.seconds) for name, case in cases.items()}
    return [
        {
            "model": model_name,
            "device": device,
            "optimizer": name,
            "first_ms": 1e3 * first[name],
            "mean_ms": 1e3 * mean[name],
            "median_ms": 1e3 * statistics.median(case.seconds),
            "max_ms": 1e3 * max(case.seconds),
            "ratio_to_sgd": mean[name] / mean["sgd"],
        }
        for name, case in cases.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["# Time of one training step beside SGD's", "", "| model | optimizer | first ms | mean ms | median ms | "]
    lines[-1] += "max ms | times SGD (means) |"
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        figures = " | ".join(f"{row[key]:.1f}" for key in ("first_ms", "mean_ms", "median_ms", "max_ms"))
        lines.append(f"| {row['model']} | {row['optimizer']} | {figures} | {row['ratio_to_sgd']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["mlp"])
    parser.add_argument("--hardware", required=True, help="the last word of the result's folder")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: the step timing is skipped; run make gpu on a machine with one")
        return
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    rows = [row for name in arguments.models for row in measure(name, arguments.device)]
    write(folder_for("step-overhead", arguments.hardware), {"rows": rows}, table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
