"""The result in Markdown and JSON: one table of all methods and tasks, one of each task, and every trial."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from benchmarks.methods import protocol
from benchmarks.methods.catalogue import METHODS
from benchmarks.methods.protocol import SECOND_SEED, TUNING_SEED, Row, median_of
from benchmarks.methods.tasks import TASKS, Task
from benchmarks.record import write

__all__ = ["overall", "save", "shown", "table"]


def save(folder: Path, rows: list[Row]) -> None:
    """Writes the tables, each run, and the curves of the repeated runs."""
    curves = [row for row in rows if row["part"] == "repeated"]
    (folder / "curves.json").write_text(json.dumps(curves) + "\n")
    kept = [{key: value for key, value in row.items() if key != "curve"} | {"score": last_score(row)} for row in rows]
    write(folder, {"rows": kept}, table(rows))


def table(rows: list[Row]) -> str:
    """Returns the whole result in Markdown, losing settings included."""
    lines = ["# Methods to their targets", "", protocol.__doc__ or "", "## All tasks", "", *overall(rows), ""]
    for name, of_task in by(rows, "task").items():
        lines += [f"## {name}", "", *summary(name, of_task), ""]
    for name, of_task in by(rows, "task").items():
        lines += [f"## {name}: every trial, on seeds {TUNING_SEED} and {SECOND_SEED}", "", *every_trial(of_task), ""]
    return "\n".join(lines)


def overall(rows: list[Row]) -> list[str]:
    """Returns CPU seconds and steps of each method on each task, medians of three seeds; else the last score."""
    repeated = by([row for row in rows if row["part"] == "repeated"], "task")
    lines = [
        "| method | " + " | ".join(_question(TASKS[name]) for name in repeated) + " |",
        "|---" * (len(repeated) + 1) + "|",
    ]
    for method in METHODS:
        cells = []
        for of_task in repeated.values():
            runs = [row for row in of_task if row["method"] == method]
            cells.append(_both(runs) if runs else "")
        if any(cells):
            lines.append(f"| {method} | {' | '.join(cells)} |")
    words = "CPU seconds, and optimizer steps in brackets: medians of three seeds. In italics: the last score of a run"
    return [*lines, "", f"{words} that did not reach its target."]


def summary(name: str, rows: list[Row]) -> list[str]:
    """Returns the table of repeated runs of one task, the quickest method first, and ours over the best rival's."""
    task, methods = TASKS[name], by([row for row in rows if row["part"] == "repeated"], "method")
    trials = Counter(row["method"] for row in rows if row["part"] == "tuned" and row["seed"] == TUNING_SEED)
    lines = [
        f"{task.title}: {task.measure} {task.target:g}. {_range(trials.values())} trials of each method. Medians of"
    ]
    lines += [f"three seeds, each in brackets. Counts are exact to {task.every} steps.", ""]
    lines += ["| method | CPU seconds | steps | ms per step | score at the end | setting | beyond its first range |"]
    lines += ["|---" * 7 + "|"]
    for method, runs in sorted(methods.items(), key=lambda item: median_of(item[1], "target_seconds")):
        scores = [math.nan if (score := last_score(row)) is None else score for row in runs]
        cells = [
            method,
            shown([row["target_seconds"] for row in runs], digits=2),
            shown([row["target_step"] for row in runs]),
            f"{statistics.median(row['ms_per_step'] for row in runs):.0f}",
            f"{statistics.median(scores):.4g}",
            runs[0]["setting"],
            ", ".join(runs[0]["outside"]) or "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    ratios = [_ratio(methods, what) for what in ("target_seconds", "target_step")]
    return [*lines, "", f"The best of ours over the best rival's: seconds {ratios[0]}, steps {ratios[1]}."]


def every_trial(rows: list[Row]) -> list[str]:
    lines = ["| method | seed | setting | CPU seconds | steps | score at the end | ending |", "|---" * 7 + "|"]
    for row in (row for row in rows if row["part"] == "tuned"):
        score = "-" if (last := last_score(row)) is None else f"{last:.4g}"
        seconds = "-" if row["target_seconds"] is None else f"{row['target_seconds']:.1f}"
        cells = [row["method"], row["seed"], row["setting"], seconds, row["target_step"] or "-", score]
        cells.append(f"{row['ending']} after {row['steps']}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def shown(values: list[float | None], digits: int = 0) -> str:
    """Returns the median, and each value in brackets; a dash is a run that never reached the target."""
    middle = statistics.median(math.inf if value is None else value for value in values)
    each = ", ".join("-" if value is None else f"{value:.{digits}f}" for value in values)
    return f"{'-' if middle == math.inf else f'{middle:.{digits}f}'} ({each})"


def by(rows: list[Row], what: str) -> dict[str, list[Row]]:
    """Returns the rows by a value of theirs, in the order of its first row."""
    return {value: [row for row in rows if row[what] == value] for value in dict.fromkeys(row[what] for row in rows)}


def last_score(row: Row) -> float | None:
    """Returns the score of a run's last test, whether its curve is there or was stored apart; None: it had no test."""
    if "curve" not in row:
        return None if row["score"] is None else float(row["score"])
    return float(row["curve"][-1]["score"]) if row["curve"] else None


def _both(runs: list[Row]) -> str:
    seconds, steps = (median_of(runs, what) for what in ("target_seconds", "target_step"))
    if math.isfinite(seconds):
        return f"{seconds:.1f} ({steps:.0f})"
    scores = [score for row in runs if (score := last_score(row)) is not None]
    return f"*{statistics.median(scores):.3g}*" if scores else "*diverged*"


def _question(task: Task) -> str:
    return f"{task.title}: {task.measure} {task.target:g}"


def _ratio(methods: dict[str, list[Row]], what: str) -> str:
    medians = {method: median_of(runs, what) for method, runs in methods.items()}
    ours, best = (
        min((value for method, value in medians.items() if METHODS[method].is_ours is is_ours), default=math.inf)
        for is_ours in (True, False)
    )
    return f"{ours / best:.2f}" if math.isfinite(ours) and math.isfinite(best) else "-"


def _range(counts: Collection[int]) -> str:
    least, most = min(counts, default=0), max(counts, default=0)
    return str(least) if least == most else f"{least} to {most}"
