"""How many optimizer steps, and seconds, does a target take: NGD beside first-order methods, Muon, SOAP and SINGD?

Each method gets up to six settings per batch size on one seed; the one with the fewest steps to the test accuracy (at a
tie, seconds) is repeated on three other seeds. If a method has an lr, it rises over a warm-up and falls linearly to 0
over a stated length; a run that misses the target within that length counts as not reached. One run is one process with
one thread, and its seconds are its CPU time without the evaluations. If a run's outcome is on disk, it is not repeated,
so that the command can be resumed. Settings marked "explored" were tried beside the six, on the same seed.

    python -m benchmarks.steps_to_target --data-dir DIR --work DIR
"""

import argparse
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import folder_for, write
from benchmarks.target_methods import FIRST_ORDER
from benchmarks.target_run import Run, outcome_of
from benchmarks.target_settings import EXPLORED, SETTINGS
from benchmarks.target_tasks import TASKS, Task

TUNING_SEED, SEEDS = 0, (1, 2, 3)
Row = dict[str, Any]


def steps_of(row: Row) -> float:
    return float(row["accuracy_step"] or math.inf)


def best_of(rows: list[Row]) -> Row:
    """Returns the row with the fewest steps, and at a tie seconds; if none reached the target, the most accurate."""
    return min(rows, key=lambda row: (steps_of(row), row["accuracy_seconds"] or math.inf, -last(row, "accuracy")))


def last(row: Row, what: str) -> float:
    return float(row["curve"][-1][what]) if row["curve"] else math.nan


def measure(name: str, batches: list[int], methods: list[str], data_dir: Path, work: Path) -> list[Row]:
    """Returns one row per run: every setting on one seed, then the best of each method on three more."""
    task = TASKS[name]
    data = task.load(data_dir)
    work.mkdir(parents=True, exist_ok=True)

    def row_of(run: Run, part: str) -> Row:
        row = outcome_of(run, task, data, work) | {"part": part}
        print(f"{run.batch} {run.method}, seed {run.seed}: {run.setting}: {row['accuracy_step']} steps", flush=True)
        return row

    rows: list[Row] = []
    for batch in batches:
        for method in methods:
            runs = [Run(name, batch, method, s, TUNING_SEED, stops=True) for s in SETTINGS[batch][method]]
            tuned = [row_of(run, "tuned") for run in runs]
            best = runs[tuned.index(best_of(tuned))]
            rows += tuned
            rows += [row_of(replace(best, seed=seed, stops=False), "repeated") for seed in SEEDS]
            explored = EXPLORED.get(batch, {}).get(method, [])
            rows += [row_of(Run(name, batch, method, s, TUNING_SEED, stops=True), "explored") for s in explored]
    return rows


def median_of(rows: list[Row], what: str) -> float:
    return statistics.median(math.inf if row[what] is None else row[what] for row in rows)


def shown(values: list[float | None], digits: int = 0) -> str:
    """Returns the median, and each value in brackets; a dash is a run that never reached the target."""
    middle = statistics.median(math.inf if value is None else value for value in values)
    each = ", ".join("-" if value is None else f"{value:.{digits}f}" for value in values)
    return f"{'-' if middle == math.inf else f'{middle:.{digits}f}'} ({each})"


def summary(rows: list[Row], batch: int) -> list[str]:
    """Returns the table of repeated runs, with each method's steps over the best first-order method's."""
    repeats = [row for row in rows if row["batch"] == batch and row["part"] == "repeated"]
    by_method = {m: [row for row in repeats if row["method"] == m] for m in dict.fromkeys(r["method"] for r in repeats)}
    rivals = [median_of(by_method[m], "accuracy_step") for m in FIRST_ORDER if m in by_method]
    bar = min(rivals, default=math.nan)
    lines = ["| method | best setting | steps to accuracy | of first-order | CPU s | steps to loss | ms per step |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for method, runs in sorted(by_method.items(), key=lambda item: median_of(item[1], "accuracy_step")):
        ratio = median_of(runs, "accuracy_step") / bar
        cells = [
            method,
            runs[0]["setting"],
            shown([row["accuracy_step"] for row in runs]),
            f"{ratio:.2f}" if math.isfinite(ratio) else "-",
            shown([row["accuracy_seconds"] for row in runs], digits=1),
            shown([row["loss_step"] for row in runs]),
            f"{statistics.median(row['ms_per_step'] for row in runs):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def every_setting(rows: list[Row], batch: int) -> list[str]:
    lines = ["| method | setting | steps to accuracy | CPU s | steps to loss | accuracy at the end | after |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in (row for row in rows if row["batch"] == batch and row["part"] != "repeated"):
        seconds = f"{row['accuracy_seconds']:.1f}" if row["accuracy_seconds"] else "-"
        note = " (explored)" if row["part"] == "explored" else ""
        ending = "diverged" if row["ending"] == "diverged" else f"{last(row, 'accuracy'):.4f}"
        lines.append(
            f"| {row['method']}{note} | {row['setting']} | {row['accuracy_step'] or '-'} | {seconds} | "
            f"{row['loss_step'] or '-'} | {ending} | {row['steps']} steps |"
        )
    return lines


def table(rows: list[Row], name: str, task: Task) -> str:
    """Returns the whole result in Markdown, losing settings included."""
    explanation = (__doc__ or "").split("\n\n    ")[0]
    lines = [f"# Steps to target, {name}", "", explanation, ""]
    lines += [f"Targets: test accuracy {task.accuracy:g}; mean loss of the training batches since the last evaluation,"]
    lines += [f"at most {task.loss:g}. The three seeds' runs go on to their whole length: `curves.json` has them.", ""]
    for batch in dict.fromkeys(row["batch"] for row in rows):
        resolution = task.evaluate_every[batch]
        lines += [f"## Batch {batch:,}: the best setting on three seeds", "", f"Counts are exact to {resolution}.", ""]
        lines += [*summary(rows, batch), "", f"## Batch {batch:,}: every setting, seed {TUNING_SEED}", ""]
        lines += [*every_setting(rows, batch), ""]
    lines += ["Not run, for want of a GPU: ResNets on CIFAR-10 and Imagenette, and with them LARS and Shampoo.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="the folder that holds fashion-mnist/")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of the outcomes, from which a later call goes on"
    )
    parser.add_argument("--task", choices=list(TASKS), default="fashion-mnist")
    parser.add_argument("--batches", type=int, nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS[4096]), default=list(SETTINGS[4096]))
    parser.add_argument("--hardware", default="cpu", help="last word in the name of the result's folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(arguments.task, arguments.batches, arguments.only, arguments.data_dir, arguments.work)
    folder = folder_for("steps-to-target", arguments.hardware)
    curves = [row for row in rows if row["part"] == "repeated"]
    (folder / "curves.json").write_text(json.dumps(curves) + "\n")
    result = {"rows": [{key: value for key, value in row.items() if key != "curve"} for row in rows]}
    text = table(rows, arguments.task, TASKS[arguments.task])
    write(folder, result, text)
    print(text)


if __name__ == "__main__":
    main()
