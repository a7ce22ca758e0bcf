"""The figures of the guides, from the parts of the result."""

import itertools
from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.exact.tables import Rows, groups

__all__ = ["FIGURES", "Draw"]

Draw = Callable[[Any, Rows], None]  # on an array of two axes
STEP, SECONDS, SCORE = range(3)
SOLVED = 1e-2


def by_steps_and_seconds(measure: str, scale: str = "log") -> Draw:
    """Returns a drawing of each seed's course by steps and by seconds."""

    def draw(axes: Any, rows: Rows) -> None:
        names = list(dict.fromkeys(row["method"] for row in rows))
        for axis, (x, label) in zip(axes, ((STEP, "steps"), (SECONDS, "CPU seconds")), strict=True):
            for row in rows:
                points = [(point[x], point[SCORE]) for point in row["points"] if point[x] > 0]
                colour = names.index(row["method"])
                style = {"color": f"C{colour}", "ls": ("-", "--", ":")[colour % 3], "lw": 0.9}
                axis.plot(*zip(*points, strict=True), label=row["method"] if row["seed"] == 0 else None, **style)
            axis.set(xlabel=label, ylabel=measure, xscale="log", yscale=scale)
        axes[0].legend(fontsize=7)

    return draw


def mixture(axes: Any, rows: Rows) -> None:
    for axis, ((problem,), of_problem) in zip(axes, groups(rows, "problem"), strict=True):
        for number, ((method,), seeds) in enumerate(groups(of_problem, "method")):
            medians = [median(row["points"][i][SCORE] for row in seeds) for i in range(len(seeds[0]["points"]))]
            axis.plot(medians, label=method, color=f"C{number}", ls=("-", "--", ":")[number % 3], lw=1.2)
        axis.set(title=problem.replace("_", " "), xlabel="steps", ylabel="loss over the first, median", yscale="log")
    axes[0].legend(fontsize=7)


def waveform(axes: Any, rows: Rows) -> None:
    for axis, ((problem,), of_problem) in zip(axes, groups(rows, "problem"), strict=True):
        for number, row in enumerate(of_problem):
            misfits = [point[SCORE] for point in row["points"]]
            axis.plot(misfits, label=row["method"], marker="osv"[number], ms=4, lw=1.2)
        axis.set(title=problem.replace(",", " at frequency"), xlabel="steps", ylabel="misfit", yscale="log")
    axes[0].legend(fontsize=7)


def arrivals(axes: Any, rows: Rows) -> None:
    """Draws how many of the pairs are solved under each loss and direction."""
    for axis, ((longest,), of_length) in zip(axes, groups(rows, "longest"), strict=True):
        for number, ((loss,), of_loss) in enumerate(groups(of_length, "loss")):
            solved = {
                f"{metric} ({loss.replace('_', ' ')})": sum(row["error"] < SOLVED for row in of_method)
                for (metric,), of_method in groups(of_loss, "metric")
            }
            bars = axis.barh(list(solved), list(solved.values()), color=f"C{number}")
            axis.bar_label(bars, padding=2, fontsize=7)
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=7)
        axis.set(title=f"lengths up to {longest:g}", xlabel="solved, of 20 pairs", xlim=(0, 22))


def rates(axes: Any, rows: Rows) -> None:
    for axis, ((method,), of_method) in zip(axes, groups(rows, "method"), strict=True):
        for number, row in enumerate(of_method):
            left = list(itertools.accumulate(row["ratios"], lambda a, b: a * b, initial=1.0))
            label = f"lambda_max = {row['eigenvalue']:.0f}"
            axis.plot(left, label=label, color=f"C{number}", marker="osv"[number], ms=3, lw=1)
            axis.plot([row["bound"] ** k for k in range(len(left))], color=f"C{number}", ls=":", lw=1)
        axis.set(title=f"{method}; dotted: its theorem's bound", xlabel="steps", ylabel="|u - y|² over the first")
        axis.set_yscale("log")
    axes[0].legend(fontsize=7)


def growth(axes: Any, rows: Rows) -> None:
    for axis, ((by,), of_kind) in zip(axes, groups(rows, "by"), strict=True):
        for number, ((form,), of_form) in enumerate(groups(of_kind, "form")):
            axis.plot([row[by] for row in of_form], [row["ms"] for row in of_form], marker="os"[number], label=form)
        fixed = "rows" if by == "weights" else "weights"
        title = f"{of_kind[0][fixed]} {fixed}"
        axis.set(title=title, xlabel=by, ylabel="CPU ms of a step", xscale="log", yscale="log")
    axes[0].legend(title="form", fontsize=7)


# By part: the text for who can't see the figure, and the drawing.
FIGURES: dict[str, tuple[str, Draw]] = {
    "equations": (
        "Relative error of Poisson's equation by steps and by CPU seconds: EnergyNGD goes below 1e-5, Adam and L-BFGS "
        "stay above",
        by_steps_and_seconds("relative error"),
    ),
    "classifier": (
        "Negative ELBO of a Gaussian process by steps and by CPU seconds: natural steps with Adam beside Adam alone",
        by_steps_and_seconds("negative ELBO", "linear"),
    ),
    "categories": (
        "Conditional KL divergence by steps and by CPU seconds: DSNGD beside SGD, Adam and Newton's method",
        by_steps_and_seconds("conditional KL divergence"),
    ),
    "mixture": ("Loss of a mixture's density by steps, under two losses, for five metrics and the gradient", mixture),
    "waveform": ("Misfit of waveform inversion by steps at two frequencies, for three metrics", waveform),
    "arrivals": ("How many of 20 pairs of layers are solved under each loss and metric", arrivals),
    "rates": ("Squared residual by steps for the exact gradient and K-FAC, on inputs of three conditions", rates),
    "growth": ("CPU time of a step of EnergyNGD by weights and by rows, for both forms", growth),
}
