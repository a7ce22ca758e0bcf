"""Draws the pictures of docs/pictures from real runs: a step over two ranks, the ages of statistics, a planned scaling.

Run on a machine with nothing else to do: make pictures
"""

import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import multiprocessing, nn
from torch.nn import functional as F

from benchmarks.themes import themed
from ngd_dist import NGD, NGDConfig

FOLDER = Path(__file__).parents[1] / "pictures"
RECIPE = Path(__file__).parents[2] / "workers" / "ngd_workers" / "recipes" / "imagenet-resnet50-4k.yaml"
CLUSTER = "nodes: 2\ndevices_per_node: 4\ndevice: v100\n" \
          "inside: {latency_us: 5, gb_s: 50}\nbetween: {latency_us: 10, gb_s: 25}\n"  # fmt: skip
RANKS, STEPS, SHOWN = 2, 120, 6
WIDTHS = (256, 512, 512, 256, 256, 10)
PHASES = {
    "forward, backward": "#b0bec5",
    "capture": "#ffcc80",
    "reduce": "#90caf9",
    "refresh": "#3949ab",
    "apply": "#80cbc4",
    "publish": "#5c9bd1",
    "update": "#8d6e63",
}


def main() -> None:
    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "ngd", "svg.fonttype": "none", "font.size": 9})
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        multiprocessing.spawn(_train, (place,), RANKS)
        runs = [torch.load(Path(place, f"{rank}.pt")) for rank in range(RANKS)]
        _save("step", _timeline([run["seconds"] for run in runs]))
        _save("staleness", _ages(runs[0]["ages"], runs[0]["names"]))
        _plan(Path(place))


def _train(rank: int, place: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    prototypes = torch.randn(10, WIDTHS[0])
    widths = itertools.pairwise(WIDTHS)
    model = nn.Sequential(*(part for a, b in widths for part in (nn.Linear(a, b), nn.ReLU())))[:-1]
    optimizer = NGD(model, NGDConfig(lr=0.05, damping=0.1, ema_decay=0.5))
    torch.manual_seed(1 + rank)
    seconds, ages = list[dict[str, float]](), list[list[int]]()
    for _ in range(STEPS):
        labels = torch.randint(10, (512,))
        inputs = prototypes[labels] + 2 * torch.randn(512, WIDTHS[0])
        dist.barrier()
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        passes = time.perf_counter() - start
        optimizer.step()
        told = dict(optimizer.stats.seconds)
        seconds.append({"forward, backward": passes - told.get("capture", 0.0), **told})
        ages.append(list(optimizer.stats.ages))
    torch.save({"seconds": seconds, "ages": ages, "names": optimizer.statistic_names}, f"{place}/{rank}.pt")
    dist.destroy_process_group()


def _timeline(runs: list[list[dict[str, float]]]) -> Any:
    """Returns a lane for each rank, in which the phases of some steps follow each other; the widths are seconds."""
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    axis = figure.subplots()
    starts, first = 0.0, STEPS // 2
    for step in range(first, first + SHOWN):
        longest = 0.0
        for rank, seconds in enumerate(runs):
            at = starts
            for phase, colour in PHASES.items():
                width = 1000 * seconds[step].get(phase, 0.0)
                axis.barh(-rank, width, 0.7, at, color=colour, label=phase if step == first and rank == 0 else None)
                at += width
            longest = max(longest, at - starts)
        axis.text(starts, 0.45, f"step {step}", fontsize=8)
        starts += longest + 2
    axis.set_yticks([-rank for rank in range(len(runs))], [f"rank {rank}" for rank in range(len(runs))])
    axis.set(xlabel="milliseconds", ylim=(-len(runs) + 0.5, 0.8))
    figure.legend(loc="outside lower center", ncols=len(PHASES), fontsize=8)
    return figure


def _ages(ages: list[list[int]], names: list[str]) -> Any:
    """Returns a row for each statistic; dark where it has just been measured, and paler with each step since."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(list(zip(*ages, strict=True)), aspect="auto", cmap="Blues_r", interpolation="nearest")
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set(xlabel="step", ylabel="layer.statistic")
    figure.colorbar(image, label="age in steps")
    return figure


def _save(name: str, figure: Any) -> None:
    path = FOLDER / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    path.write_text(themed(path.read_text()))


def _plan(place: Path) -> None:
    cluster = place / "cluster.yaml"
    cluster.write_text(CLUSTER)
    shape = ["--shape", "images:3x224x224:1000", "--samples", "1281167", "--plot", str(FOLDER / "planner.svg")]
    ngd = Path(sys.executable).with_name("ngd")
    subprocess.run([ngd, "plan", RECIPE, "--cluster", cluster, *shape], check=True, stdout=subprocess.DEVNULL)
    (FOLDER / "planner.svg").write_text(themed((FOLDER / "planner.svg").read_text()))


if __name__ == "__main__":
    main()
