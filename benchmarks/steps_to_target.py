"""How many CPU seconds, and steps, does a target take: NGD beside SGD, AdamW, LAMB, Muon, SOAP and Shampoo?

Every method gets the same number of trials on one seed; NGD's two recipes are two methods. The first ones are drawn
evenly from its ranges, which are the same for all tasks; the rest from a third of each range around the best of the
first, so that a best at the edge of a range has room beyond it. One of a method's numbers is the length of its
schedule: if it has an lr, that rises over the first tenth of the steps and falls linearly to 0 at the last. The three
settings with the fewest seconds to the target are tried on a second seed, for one seed alone favours schedules that are
just long enough; the setting whose worse seed took the fewest seconds is repeated on three other seeds, the methods in
turn. One run is one process with one thread, and its seconds are its CPU time without the evaluations. If a run's
outcome is on disk, it is not repeated, so that the command can be resumed.

    python -m benchmarks.steps_to_target --data-dir DIR --work DIR
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import folder_for, write
from benchmarks.target_methods import METHODS, SEARCHED
from benchmarks.target_run import Run, outcome_of
from benchmarks.target_search import Point, Range, Space, around, draw, is_outside
from benchmarks.target_tasks import TASKS, Data, Task

__all__ = ["SEEDS", "measure", "median_of", "order", "row_of", "search", "space_of", "table"]

TUNING_SEED, SECOND_SEED, SEEDS = 0, 4, (1, 2, 3)
FINALISTS = 3  # settings that are tried on the second seed
FIRST_SHARE = 5 / 8  # of the trials, drawn from the whole ranges
Row = dict[str, Any]


def seconds_of(row: Row) -> float:
    return float(math.inf if row["target_seconds"] is None else row["target_seconds"])


def rank(row: Row, task: Task) -> tuple[float, float]:
    """Returns what is least for the best run: the seconds, and behind them how close it came without a target."""
    sign = -1 if task.measure == "test accuracy" else 1
    return seconds_of(row), min((sign * point["score"] for point in row["curve"]), default=math.inf)


def order(rows: list[Row], task: Task) -> list[int]:
    """Returns the indices of the rows, the best one first."""
    return sorted(range(len(rows)), key=lambda index: rank(rows[index], task))


def measure(name: str, methods: list[str], data: Data, work: Path) -> list[Row]:
    """Returns one row per run: every trial, then the best setting of each method on three more seeds."""
    task, rows, best = TASKS[name], list[Row](), dict[str, Point]()
    for method in methods:
        tried, best[method] = search(name, method, data, work)
        rows += tried
    for seed in SEEDS:
        for method in methods:
            row = row_of(Run(name, method, best[method], seed), "repeated", data, work)
            rows.append(row | {"outside": is_outside(space_of(method, task), best[method])})
    return rows


def search(name: str, method: str, data: Data, work: Path) -> tuple[list[Row], Point]:
    """Returns one row per trial of a method on a task, and the point of the best."""
    task, space, first = TASKS[name], space_of(method, TASKS[name]), round(FIRST_SHARE * TASKS[name].trials)

    def attempt(points: list[Point], seed: int) -> list[Row]:
        return [row_of(Run(name, method, point, seed), "tuned", data, work) for point in points]

    points = draw(space, first, TUNING_SEED)
    tried = attempt(points, TUNING_SEED)
    later = draw(around(space, points[order(tried, task)[0]]), task.trials - first, TUNING_SEED + 1)
    tried, points = tried + attempt(later, TUNING_SEED), points + later
    finalists = order(tried, task)[:FINALISTS]
    again = attempt([points[index] for index in finalists], SECOND_SEED)
    worse = [
        max(tried[index], row, key=lambda row: rank(row, task)) for index, row in zip(finalists, again, strict=True)
    ]
    return tried + again, points[finalists[order(worse, task)[0]]]


def row_of(run: Run, part: str, data: Data, work: Path) -> Row:
    """Returns the outcome of a run, after it has said so."""
    row = outcome_of(run, TASKS[run.task], data, work) | {"part": part}
    print(f"{run.task} {run.method}, seed {run.seed}: {run}: {_seconds(row)} s, {row['target_step']} steps", flush=True)
    return row


def space_of(method: str, task: Task) -> Space:
    """Returns the ranges of a method's numbers on a task; a method without a schedule has no length to choose."""
    longest = Range(task.steps.high, task.steps.high)
    return {**METHODS[method].space, "steps": task.steps if METHODS[method].has_schedule else longest}


def median_of(rows: list[Row], what: str) -> float:
    return statistics.median(math.inf if row[what] is None else row[what] for row in rows)


def shown(values: list[float | None], digits: int = 0) -> str:
    """Returns the median, and each value in brackets; a dash is a run that never reached the target."""
    middle = statistics.median(math.inf if value is None else value for value in values)
    each = ", ".join("-" if value is None else f"{value:.{digits}f}" for value in values)
    return f"{'-' if middle == math.inf else f'{middle:.{digits}f}'} ({each})"


def _seconds(row: Row) -> str:
    return "-" if row["target_seconds"] is None else f"{row['target_seconds']:.1f}"


def summary(rows: list[Row]) -> list[str]:
    """Returns the table of repeated runs of one task, with NGD's figures over the best rival's."""
    repeats = [row for row in rows if row["part"] == "repeated"]
    by_method = {m: [row for row in repeats if row["method"] == m] for m in dict.fromkeys(r["method"] for r in repeats)}
    lines = ["| method | CPU seconds | steps | ms per step | setting | beyond its first range |"]
    lines += ["|---|---|---|---|---|---|"]
    for method, runs in sorted(by_method.items(), key=lambda item: median_of(item[1], "target_seconds")):
        cells = [
            method,
            shown([row["target_seconds"] for row in runs], digits=2),
            shown([row["target_step"] for row in runs]),
            f"{statistics.median(row['ms_per_step'] for row in runs):.0f}",
            runs[0]["setting"],
            ", ".join(runs[0]["outside"]) or "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    ratios = [_ratio(by_method, what) for what in ("target_seconds", "target_step")]
    return [*lines, "", f"The better of NGD's two rows over the best rival's: seconds {ratios[0]}, steps {ratios[1]}."]


def _ratio(by_method: dict[str, list[Row]], what: str) -> str:
    medians = {method: median_of(runs, what) for method, runs in by_method.items()}
    ours, best = (
        min((value for method, value in medians.items() if METHODS[method].is_ours is is_ours), default=math.inf)
        for is_ours in (True, False)
    )
    return f"{ours / best:.2f}" if math.isfinite(ours) and math.isfinite(best) else "-"


def every_trial(rows: list[Row]) -> list[str]:
    lines = ["| method | seed | setting | CPU seconds | steps | score at the end | ending |", "|---" * 7 + "|"]
    for row in (row for row in rows if row["part"] == "tuned"):
        score = f"{row['curve'][-1]['score']:.4g}" if row["curve"] else "-"
        cells = [row["method"], row["seed"], row["setting"], _seconds(row), row["target_step"] or "-", score]
        cells.append(f"{row['ending']} after {row['steps']}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def table(rows: list[Row]) -> str:
    """Returns the whole result in Markdown, losing settings included."""
    explanation = (__doc__ or "").split("\n\n    ")[0]
    lines = ["# Seconds and steps to target", "", explanation, ""]
    for name in dict.fromkeys(row["task"] for row in rows):
        task, of_task = TASKS[name], [row for row in rows if row["task"] == name]
        lines += [f"## {name}", ""]
        trials = f"{task.trials} trials of each method, and {FINALISTS}\nagain on another seed."
        lines += [f"{task.title}: {task.measure} {task.target:g}. {trials} Medians of three seeds, each in brackets."]
        lines += [f"Counts are exact to {task.every} steps.", ""]
        lines += [*summary(of_task), ""]
    for name in dict.fromkeys(row["task"] for row in rows):
        lines += [f"## {name}: every trial, on seeds {TUNING_SEED} and {SECOND_SEED}", ""]
        lines += [*every_trial([row for row in rows if row["task"] == name]), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of the outcomes, from which a later call goes on"
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--only", nargs="+", choices=SEARCHED, default=SEARCHED, help="methods")
    parser.add_argument("--hardware", default="cpu", help="last word in the name of the result's folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = list[Row]()
    for name in arguments.tasks:
        data = TASKS[name].load(arguments.data_dir)
        rows += measure(name, arguments.only, data, arguments.work)
    folder = folder_for("steps-to-target", arguments.hardware)
    curves = [row for row in rows if row["part"] == "repeated"]
    (folder / "curves.json").write_text(json.dumps(curves) + "\n")
    text = table(rows)
    write(folder, {"rows": [{key: value for key, value in row.items() if key != "curve"} for row in rows]}, text)
    print(text)


if __name__ == "__main__":
    main()
