"""What does curvature from a part of the batch save? Steps and CPU seconds to 85 %, Fashion-MNIST, batch 4,096.

NGD chooses lr, momentum and damping itself, from the same settings on every row: only the fraction of the batch differs
of which statistics and the quadratic model are made; gradients are of all samples. Muon, SOAP and LAMB have the
settings that did best in the search of 2026-11-21. Three seeds, methods in turn, one process with one thread for each
run; the seconds are its CPU time without the evaluations.

    python -m benchmarks.curvature_part --data-dir DIR --work DIR
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.methods.catalogue import METHODS
from benchmarks.methods.page import shown
from benchmarks.methods.protocol import median_of
from benchmarks.methods.run import Run, outcome_of
from benchmarks.methods.search import Point
from benchmarks.methods.tasks import TASKS
from benchmarks.record import folder_for, write

TASK, SEEDS = "fashion-mnist-4096", (1, 2, 3)
FRACTIONS = (1.0, 1 / 4, 1 / 8, 1 / 16, 1 / 32)
RIVALS: dict[str, Point] = {
    "muon": {"lr": 0.05, "adamw_lr": 0.02, "steps": 100.0},
    "soap": {"lr": 0.02, "steps": 90.0},
    "lamb": {"lr": 0.04, "steps": 140.0},
}


def ours(fraction: float) -> Point:
    return {"damping": 0.03, "fraction": fraction, "interval": 1.0, "steps": 60.0}


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the result in Markdown, with the medians of each setting and its runs in brackets."""
    explanation = (__doc__ or "").split("\n\n    ")[0]
    lines = ["# Curvature from a part of the batch", "", explanation, ""]
    lines += ["| method | CPU seconds | steps | ms per step |", "|---|---|---|---|"]
    for name in dict.fromkeys(row["name"] for row in rows):
        runs = [row for row in rows if row["name"] == name]
        seconds, steps = ([row[what] for row in runs] for what in ("target_seconds", "target_step"))
        each = statistics.median(row["ms_per_step"] for row in runs)
        lines.append(f"| {name} | {shown(seconds, digits=2)} | {shown(steps)} | {each:.0f} |")
    best = min(
        median_of([row for row in rows if row["name"] == name], "target_seconds")
        for name in {row["name"] for row in rows if not METHODS[row["method"]].is_ours}
    )
    ratios = [
        f"{name} {median_of([row for row in rows if row['name'] == name], 'target_seconds') / best:.2f}"
        for name in dict.fromkeys(row["name"] for row in rows if METHODS[row["method"]].is_ours)
    ]
    return "\n".join([*lines, "", f"Seconds over those of the best rival: {', '.join(ratios)}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="the folder that holds fashion-mnist/")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of the outcomes, from which a later call goes on"
    )
    parser.add_argument("--hardware", default="cpu", help="last word in the name of the result's folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = TASKS[TASK]
    data = task.load(arguments.data_dir)
    arguments.work.mkdir(parents=True, exist_ok=True)
    settings = [
        (f"ngd, on {round(task.batch * fraction):,}", "kfac-adaptive", ours(fraction)) for fraction in FRACTIONS
    ]
    settings += [(method, method, point) for method, point in RIVALS.items()]
    rows = []
    for seed in SEEDS:
        for name, method, point in settings:
            row = outcome_of(Run(TASK, method, point, seed), task, data, arguments.work)
            print(f"{name}, seed {seed}: {row['target_seconds']} s, {row['target_step']} steps", flush=True)
            rows.append(row | {"name": name})
    text = table(rows)
    write(folder_for("curvature-part", arguments.hardware), {"rows": rows}, text)
    print(text)


if __name__ == "__main__":
    main()
