"""The README of the result: one table per part."""

import math
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from benchmarks.exact.curves import to_reach

__all__ = ["TARGETS", "groups", "table"]

Rows = list[dict[str, Any]]
# Errors that are asked for, by part: the paper's for equations are 1e-6 and less.
TARGETS = {"equations": (1e-2, 1e-3, 1e-4, 1e-5, 1e-6), "classifier": (0.3, 0.25, 0.22, 0.2), "categories": (0.1, 0.03, 0.01, 0.003)}  # fmt: skip  # noqa: E501
TITLES = {
    "equations": "Relative error of equations",
    "classifier": "Negative ELBO of a Gaussian process with a Bernoulli likelihood",
    "mixture": "Loss of a mixture's density after 30 steps, relative to the start",
    "categories": "Conditional KL divergence of logistic regression on categories",
    "waveform": "Waveform inversion by examples/waveform.py, one medium, 4 steps",
    "arrivals": "Slowness of three layers from the records of waves",
    "rates": "Rates of two layers of ReLU, width 2,048, 64 points, lr 0.5",
    "beside_adam": "A step of EnergyNGD beside one of Adam",
    "growth": "A step of EnergyNGD by its size",
    "ranks": "A step of EnergyNGD by ranks",
}


def table(result: dict[str, Any]) -> str:
    """Returns the README's text, of the parts that there are."""
    lines = ["# Small models that are treated exactly", ""]
    for part, title in TITLES.items():
        if part in result:
            lines += [f"## {title}", "", *TABLES[part](result[part]), ""]
    return "\n".join(lines).rstrip()


def groups(rows: Rows, *keys: str) -> Iterator[tuple[tuple[Any, ...], Rows]]:
    for values in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        yield values, [row for row in rows if tuple(row[key] for key in keys) == values]


def grid(heads: list[str], lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *lines]]


def reached(part: str) -> Callable[[Rows], list[str]]:
    def of(rows: Rows) -> list[str]:
        """Median steps (CPU seconds) to each target, in brackets how many seeds reached it if not all did."""
        lines = []
        for (problem, method), seeds in groups(rows, "problem", "method"):
            cells = [problem, method]
            for target in TARGETS[part]:
                costs = [to_reach(row["points"], target) for row in seeds]
                hits = sum(math.isfinite(steps) for steps, _ in costs)
                steps, seconds = median(c[0] for c in costs), median(c[1] for c in costs)
                of_all = "" if hits == len(seeds) else f", {hits} of {len(seeds)}"
                cells.append(f"{steps:.0f} ({seconds:.2g} s){of_all}" if math.isfinite(steps) else f"never{of_all}")
            lasts = sorted(row["points"][-1][2] for row in seeds)
            lines.append([*cells, f"{median(lasts):.2g} ({lasts[0]:.2g} to {lasts[-1]:.2g})"])
        heads = ["problem", "method", *(f"to {target:g}" for target in TARGETS[part]), "at the end"]
        note = (
            "Medians over seeds of steps and CPU seconds to each score; where not all seeds reached it, how many did."
        )
        return [note, "", *grid(heads, lines)]

    return of


def mixture(rows: Rows) -> list[str]:
    lines = []
    for (problem, method), seeds in groups(rows, "problem", "method"):
        lasts = [row["points"][-1][2] for row in seeds]
        seconds = median(row["points"][-1][1] for row in seeds)
        solved = sum(last < 1e-4 for last in lasts)
        lines.append([problem, method, f"{median(lasts):.1e}", f"{solved} of {len(lasts)}", f"{seconds:.2f}"])
    return grid(["problem", "direction", "median", "below 1e-4", "CPU seconds"], lines)


def waveform(rows: Rows) -> list[str]:
    lines = []
    for row in rows:
        (_, _, first, _), (_, _, last, error) = row["points"][0], row["points"][-1]
        lines.append([row["problem"].split(", ")[1], row["method"], f"{first:.2g}", f"{last:.2g}", f"{error:.0%}"])
    return grid(["frequency", "metric", "misfit at the start", "at the end", "error of the medium"], lines)


def arrivals(rows: Rows) -> list[str]:
    lines = []
    for (loss, metric), of_method in groups(rows, "loss", "metric"):
        cells = [loss, metric]
        for _, of_length in groups(of_method, "longest"):
            cells.append(f"{sum(row['error'] < 1e-2 for row in of_length)} of {len(of_length)}")
        lines.append(cells)
    heads = ["loss", "direction", "solved, lengths up to 1", "lengths up to 128"]
    return ["Solved: each slowness is within 1e-2 after 30 steps.", "", *grid(heads, lines)]


def rates(rows: Rows) -> list[str]:
    lines = []
    for row in rows:
        spread = f"{min(row['ratios']):.3f} to {max(row['ratios']):.3f}"
        lines.append([f"{row['decades']:g}", f"{row['eigenvalue']:.1f}", row["method"], f"{row['bound']:.3f}", spread])
    return grid(["decades", "lambda_max of XᵀX", "method", "bound", "squared residual, after over before"], lines)


def beside_adam(rows: Rows) -> list[str]:
    lines = []
    for row in rows:
        least, most = row["spread"]
        times = f"{row['ratio']:.1f} ({least:.1f} to {most:.1f})"
        lines.append([row["problem"], row["method"], f"{row['ms']:.2f}", times])
    return grid(["problem", "step of", "ms", "times Adam's"], lines)


def growth(rows: Rows) -> list[str]:
    lines = [[str(row["weights"]), str(row["rows"]), row["form"], f"{row['ms']:.1f}"] for row in rows]
    return grid(["weights", "rows", "form", "ms"], lines)


def ranks(rows: Rows) -> list[str]:
    lines = [
        [str(row["ranks"]), row["form"], str(row["weights"]), str(row["rows"]), f"{row['ms']:.0f}"] for row in rows
    ]
    return ["CPU time of the slower rank.", "", *grid(["ranks", "form", "weights", "rows", "ms"], lines)]


TABLES: dict[str, Callable[[Rows], list[str]]] = {
    **{part: reached(part) for part in TARGETS},
    "mixture": mixture, "waveform": waveform, "arrivals": arrivals, "rates": rates,
    "beside_adam": beside_adam, "growth": growth, "ranks": ranks,
}  # fmt: skip
