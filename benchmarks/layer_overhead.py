"""How many milliseconds does a step cost per layer, beyond SGD's, if the layers are so small that only calls count?

Stacks of 100 and of 400 blocks Linear(32, 32) and ReLU, batch 256, one thread. Blocks of steps alternate with blocks
of SGD with momentum, on the clock of this process's CPU time; the figure is the median over blocks of the difference to
the SGD blocks just before and after, per layer. Refreshes: at every step, at every tenth (layers take turns), and none
("idle"). The row "sgd" is SGD against itself: its distance from 0 is the error of the measurement.

    python -m benchmarks.layer_overhead  # two minutes
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.record import folder_for, write
from ngd_dist import NGD, NGDConfig
from ngd_dist.config import FixedInterval

WIDTH, BATCH, LR = 32, 256, 1e-6
STACKS = (100, 400)
NEVER = 10**6  # steps
CASES = {"sgd": 0, "1/1": 1, "10/10": 10, "idle": NEVER}  # by name, the interval of refreshes
# Half of the ms per layer that the cheapest rival (ASDL) took on a machine like this one; it has no figure for "idle".
TARGETS = {"1/1": 0.25, "10/10": 0.07}


def stack(layers: int) -> nn.Module:
    """Returns the blocks, with weights that keep activations and gradients of deep stacks from vanishing."""
    torch.manual_seed(0)
    linears = [nn.Linear(WIDTH, WIDTH) for _ in range(layers)]
    for linear in linears:
        nn.init.orthogonal_(linear.weight, gain=2**0.5)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(*(module for linear in linears for module in (linear, nn.ReLU())))


def stepper(layers: int, interval: int) -> Callable[[], None]:
    """Returns a function that takes one step of NGD with this interval of refreshes; 0: one of SGD."""
    model, x, y = stack(layers), torch.randn(BATCH, WIDTH), torch.randint(WIDTH, (BATCH,))
    optimizer: torch.optim.Optimizer
    if interval == 0:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    else:
        optimizer = NGD(model, NGDConfig(lr=LR, damping=0.1, staleness=FixedInterval(steps=interval)))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def seconds(step: Callable[[], None], steps: int) -> float:
    """Returns the mean CPU seconds of a step."""
    start = time.process_time()
    for _ in range(steps):
        step()
    return (time.process_time() - start) / steps


def rows_of(layers: int, names: Sequence[str], blocks: int, steps: int) -> list[dict[str, Any]]:
    """Returns a row for each case on a stack of this many layers. steps: those of a block, a multiple of 10."""
    sgd, cases = stepper(layers, 0), {name: stepper(layers, CASES[name]) for name in names}
    beyond: dict[str, list[float]] = {name: [] for name in names}
    of_sgd = []
    for step in (sgd, *cases.values()):
        seconds(step, 10)
    for _ in range(blocks):
        before = seconds(sgd, steps)
        for name, step in cases.items():
            spent = seconds(step, steps)
            after = seconds(sgd, steps)
            beyond[name].append(1e3 * (spent - (before + after) / 2) / layers)
            of_sgd.append(after)
            before = after
    return [
        {
            "layers": layers,
            "case": name,
            "ms_per_layer_beyond_sgd": statistics.median(values),
            "spread": [min(values), max(values)],
            "sgd_ms_per_layer": 1e3 * statistics.median(of_sgd) / layers,
            "at_most": TARGETS.get(name),
        }
        for name, values in beyond.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows in Markdown."""
    lines = ["# Milliseconds per tiny layer and step, beyond SGD's", "", (__doc__ or "").split("\n\n    ")[0], ""]
    lines += ["| layers | refresh | beyond SGD | least to most | SGD itself | target |", "|---|---|---|---|---|---|"]
    for row in rows:
        least, most = row["spread"]
        figures = f"{row['ms_per_layer_beyond_sgd']:.3f} | {least:.3f} to {most:.3f} | {row['sgd_ms_per_layer']:.3f}"
        lines.append(f"| {row['layers']} | {row['case']} | {figures} | {row['at_most'] or '-'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=int, default=STACKS)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--hardware", help="last word in the name of the result's folder; none: nothing is written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for layers in arguments.layers:
        rows += rows_of(layers, arguments.cases, arguments.blocks, steps=10)
    if arguments.hardware:
        write(folder_for("layer-overhead", arguments.hardware), {"rows": rows}, table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
