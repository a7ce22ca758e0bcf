"""The protocol: the same trials for every method, and then its best setting on other seeds.

A trial is one run on one seed. One of a method's numbers is the length of its schedule: if it has an lr, that rises
over the first tenth of the steps and falls linearly to 0 at the last. Every second trial is drawn evenly from the
method's ranges, which are the same for all tasks, and the others from a third of each range around the best so far, so
that a best at the edge of a range has room beyond it. The best settings are tried on a second seed, for one seed alone
favours schedules that are just long enough; the setting whose worse seed took the fewest seconds is repeated on three
other seeds. One run is one process with one thread, and its seconds are its CPU time without the evaluations.

The machine may do other work during hours of runs, which takes caches and memory from them. So the seconds of the
repeated runs are their steps, times what a step takes: 30 steps of each method, in turn, three times over; the median.
Measure those on a quiet machine: `--work` keeps them as it keeps runs, in files that end in `-pace0.json` and so on.

Trials come in stages: every method on every task has its trials of a stage before any has those of the next, so that
there is a whole table, with the same number of trials for all, after each stage.
"""

import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks.methods.catalogue import METHODS
from benchmarks.methods.data import Data
from benchmarks.methods.run import Run, outcome_of, pace_of
from benchmarks.methods.search import Point, Range, Space, is_outside, propose
from benchmarks.methods.tasks import TASKS, Task

__all__ = [
    "FINALISTS",
    "SEEDS",
    "STAGES",
    "Row",
    "measure",
    "median_of",
    "order",
    "rank",
    "row_of",
    "search",
    "space_of",
]

STAGES = (2, 4, 8, 16)  # trials of each method on each task, those of the earlier stages among them
TUNING_SEED, SECOND_SEED, SEEDS = 0, 4, (1, 2, 3)
ROUNDS = 3  # in which what a step takes is measured
FINALISTS = 3  # settings that are tried on the second seed, or half of the trials if those are fewer
Row = dict[str, Any]


def measure(name: str, methods: list[str], data: Data, work: Path, trials: int) -> list[Row]:
    """Returns one row per run: every trial, then the best setting of each method on three more seeds, in turn."""
    task, rows, best = TASKS[name], list[Row](), dict[str, Point]()
    for method in methods:
        tried, best[method] = search(name, method, data, work, trials)
        rows += tried
    for seed in SEEDS:
        for method in methods:
            row = row_of(Run(name, method, best[method], seed), "repeated", data, work)
            rows.append(row | {"outside": is_outside(space_of(method, task), best[method])})
    paces = paced(name, best, data, work)
    return [row | _at_pace(row, paces[row["method"]]) if row["part"] == "repeated" else row for row in rows]


def paced(name: str, best: dict[str, Point], data: Data, work: Path) -> dict[str, float]:
    """Returns the CPU milliseconds of a step of each method, the median of rounds in which they take turns."""
    rounds = [
        {
            method: pace_of(Run(name, method, point, SEEDS[0]), TASKS[name], data, work, round)
            for method, point in best.items()
        }
        for round in range(ROUNDS)
    ]
    return {method: statistics.median(of_round[method] for of_round in rounds) for method in best}


def _at_pace(row: Row, ms: float) -> Row:
    step = row["target_step"]
    return {"ms_per_step": ms, "target_seconds": None if step is None else step * ms / 1000}


def search(name: str, method: str, data: Data, work: Path, trials: int) -> tuple[list[Row], Point]:
    """Returns one row per trial of a method on a task, and the point of the best."""
    task, space = TASKS[name], space_of(method, TASKS[name])
    points, tried = list[Point](), list[Row]()
    for _ in range(trials):
        points.append(propose(space, points, points[order(tried, task)[0]] if tried else None))
        tried.append(row_of(Run(name, method, points[-1], TUNING_SEED), "tuned", data, work))
    finalists = order(tried, task)[: min(FINALISTS, max(1, trials // 2))]
    if len(finalists) == 1:
        return tried, points[finalists[0]]
    again = [row_of(Run(name, method, points[index], SECOND_SEED), "tuned", data, work) for index in finalists]
    worse = [
        max(tried[index], row, key=lambda row: rank(row, task)) for index, row in zip(finalists, again, strict=True)
    ]
    return tried + again, points[finalists[order(worse, task)[0]]]


def row_of(run: Run, part: str, data: Data, work: Path) -> Row:
    """Returns the outcome of a run, after it has said so."""
    row = outcome_of(run, TASKS[run.task], data, work) | {"part": part}
    seconds = "-" if row["target_seconds"] is None else f"{row['target_seconds']:.1f}"
    print(f"{run.task} {run.method}, seed {run.seed}: {run}: {seconds} s, {row['target_step']} steps", flush=True)
    return row


def order(rows: list[Row], task: Task) -> list[int]:
    """Returns the indices of the rows, the best one first."""
    return sorted(range(len(rows)), key=lambda index: rank(rows[index], task))


def rank(row: Row, task: Task) -> tuple[float, float]:
    """Returns what is least for the best run: the seconds, and behind them how close it came without a target."""
    seconds = math.inf if row["target_seconds"] is None else float(row["target_seconds"])
    sign = -1 if task.measure == "test accuracy" else 1
    return seconds, min((sign * point["score"] for point in row["curve"]), default=math.inf)


def space_of(method: str, task: Task) -> Space:
    """Returns the ranges of a method's numbers on a task; a method without a schedule has no length to choose."""
    longest = Range(task.steps.high, task.steps.high)
    return {**METHODS[method].space, "steps": task.steps if METHODS[method].has_schedule else longest}


def median_of(rows: list[Row], what: str) -> float:
    return statistics.median(math.inf if row[what] is None else row[what] for row in rows)
