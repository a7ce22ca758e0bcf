"""The plots of docs/performance.md and docs/methods.md: one function per question."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.exact.plots import FIGURES
from benchmarks.methods.tasks import TASKS
from benchmarks.reading import Result, compared_in, groups, is_ours, medians
from benchmarks.themes import themed

__all__ = ["has_plot", "parts_of", "plots"]

PLOTS_A_LINE = 3


def plots(results: list[Result], folder: Path) -> list[Path]:
    """Draws the plots that the page shows, as SVG; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    # The same result gives the same file, so that the repository sees a change only if a figure changes.
    matplotlib.rcParams.update({"svg.hashsalt": "ngd", "svg.fonttype": "none", "font.size": 9})
    drawn = []
    for result in (result for result in results if has_plot(result)):
        figure = PLOTS[result.question](result)
        path = folder / result.plot
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(figure, path)
        drawn.append(path)
    for result, part in [(each, part) for each in results for part in parts_of(each)]:
        figure, axes = _figure(2, 3.4)
        FIGURES[part][1](axes, result.document[part])
        path = folder / result.plot_of(part)
        _save(figure, path)
        drawn.append(path)
    if result := compared_in(results):
        for name, plot in (("overview", plot_overview), ("headline", plot_headline)):
            path = folder / f"performance/{name}_{result.hardware}.svg"
            _save(plot(result), path)
            drawn.append(path)
    return drawn


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    path.write_text(themed(path.read_text()))


def parts_of(result: Result) -> list[str]:
    """Returns the parts of the exact methods' result that have a figure each, for the page and for the guides."""
    document = result.document if result.question == "exact" else {}
    return [part for part in FIGURES if part in document]


def has_plot(result: Result) -> bool:
    needs = {"methods": "curves.json"}.get(result.question, "result.json")
    return result.question in PLOTS and (result.folder / needs).exists()


def _figure(columns: int, height: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * columns + 1.5, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _grid(number: int, height: float) -> Any:
    """Returns a figure and its axes, in lines of some; height: of a line."""
    from matplotlib.figure import Figure

    lines, columns = math.ceil(number / PLOTS_A_LINE), min(PLOTS_A_LINE, number)
    figure = Figure(figsize=(4.4 * columns, height * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes[number:]:
        axis.remove()
    return figure, axes[:number]


def plot_overview(result: Result) -> Any:
    """Returns bars of the CPU seconds to each target, ours in another colour; a method without a bar missed it."""
    rows = [row for row in result.document["rows"] if row["part"] == "repeated"]
    parts = list(groups(rows, "task"))
    height = 0.7 + 0.17 * max(len({row["method"] for row in of_task}) for _, of_task in parts)
    figure, axes = _grid(len(parts), height)
    for axis, ((name,), of_task) in zip(axes, parts, strict=True):
        seconds = sorted(medians(of_task, "target_seconds").items(), key=lambda item: -item[1])
        lengths = [value if math.isfinite(value) else 0.0 for _, value in seconds]
        colours = ["#3949ab" if is_ours(method) else "#b0bec5" for method, _ in seconds]
        bars = axis.barh([method for method, _ in seconds], lengths, color=colours)
        axis.bar_label(bars, [f"{value:.1f}" if math.isfinite(value) else "missed" for _, value in seconds], padding=2)
        axis.set(xlabel="CPU seconds to the target", xlim=(0, 1.2 * max(lengths, default=1)))
        axis.set_title(TASKS[name].title.replace(", ", ",\n", 1), fontsize=8)
        axis.tick_params(axis="y", labelsize=7)
    return figure


def plot_headline(result: Result) -> Any:
    """Returns ours over the best rival, in steps and in seconds, a pair of bars a task: below 1 ours is ahead."""
    from matplotlib.figure import Figure

    parts = list(groups([row for row in result.document["rows"] if row["part"] == "repeated"], "task"))
    figure = Figure(figsize=(8, 0.55 * len(parts) + 1), layout="constrained")
    axis = figure.subplots()
    for what, shift, colour, label in (
        ("target_step", 0.2, "#3949ab", "steps"),
        ("target_seconds", -0.2, "#9fa8da", "CPU seconds"),
    ):
        places = [len(parts) - 1 - number + shift for number in range(len(parts))]
        ratios = [_ratio_to_rivals(medians(of_task, what)) for _, of_task in parts]
        bars = axis.barh(
            places, [ratio - 1 if math.isfinite(ratio) else 0 for ratio in ratios], 0.36, 1, color=colour, label=label
        )
        axis.bar_label(
            bars, [f"{ratio:.2f}" if math.isfinite(ratio) else "missed" for ratio in ratios], padding=2, fontsize=8
        )
    axis.axvline(1, color="black", lw=0.8)
    axis.set_yticks(range(len(parts)), [TASKS[name].title for (name,), _ in reversed(parts)], fontsize=8)
    axis.set(
        xscale="log",
        xlabel="best natural gradient of this package / best rival, to the same target: left of 1 it is ahead",
    )
    axis.set_xticks(ticks := [0.25, 0.5, 1, 2, 4, 8, 16], [f"{tick:g}" for tick in ticks])
    axis.set_xlim(0.25, 24)
    axis.minorticks_off()
    axis.legend(fontsize=8)
    return figure


def _ratio_to_rivals(medians: dict[str, float]) -> float:
    """Returns the least of ours over the least of the rivals'; infinite if ours reached no target."""
    ours, rivals = ([m for method, m in medians.items() if is_ours(method) is side] for side in (True, False))
    return (
        min(ours, default=math.inf) / min(rivals, default=math.inf)
        if min(ours, default=math.inf) < math.inf
        else math.inf
    )


def plot_overhead(result: Result) -> Any:
    """Returns bars of times SGD at the smallest batch and the fewest ranks, ours in another colour."""
    rows = [row for row in result.document["rows"] if row["ratio"]]
    fewest = min(row["ranks"] for row in rows)
    rows = [row for row in rows if row["ranks"] == fewest]
    smallest = min(row["batch"] for row in rows)
    parts = list(groups([row for row in rows if row["batch"] == smallest], "model"))
    figure, axes = _figure(len(parts), 0.16 * max(len(of_model) for _, of_model in parts) + 1)
    for axis, ((model,), of_model) in zip(axes, parts, strict=True):
        of_model = sorted(of_model, key=lambda row: -row["ratio"])
        names = [f"{row['optimizer']} {row['refresh']}" for row in of_model]
        colours = ["#3949ab" if row["optimizer"].startswith("ngd") else "#b0bec5" for row in of_model]
        axis.barh(names, [row["ratio"] for row in of_model], color=colours)
        axis.set(xscale="log", title=f"{model}, batch {smallest}", xlabel="times SGD's step")
        axis.tick_params(axis="y", labelsize=6)
    return figure


def plot_memory(result: Result) -> Any:
    """Returns stacked bars of bytes by kind on rank 0, one process."""
    rows = [row for row in result.document["rows"] if row["ranks"] == 1]
    parts = list(groups(rows, "model"))
    figure, axes = _figure(len(parts), 0.2 * max(len(of_model) for _, of_model in parts) + 1.5)
    for axis, ((model,), of_model) in zip(axes, parts, strict=True):
        names, left = [row["optimizer"] for row in of_model], [0.0] * len(of_model)
        for kind in of_model[0]["bytes"]:
            counts = [row["bytes"][kind] / 1e6 for row in of_model]
            axis.barh(names, counts, left=left, label=kind)
            left = [a + b for a, b in zip(left, counts, strict=True)]
        axis.set(title=model, xlabel="MB")
        axis.tick_params(axis="y", labelsize=6)
    axes[0].legend(fontsize=6)
    return figure


def plot_curves(result: Result) -> Any:
    """Returns the score by CPU seconds of each method's best setting, one line per seed, and the target."""
    runs = json.loads((result.folder / "curves.json").read_text())
    parts = list(groups(runs, "task"))
    figure, axes = _grid(len(parts), 3.2)
    methods = list(dict.fromkeys(run["method"] for run in runs))
    for axis, ((name,), of_task) in zip(axes, parts, strict=True):
        task = TASKS[name]
        for (method,), of_method in groups(of_task, "method"):
            for number, run in enumerate(of_method):
                points = [(point["seconds"], point["score"]) for point in run["curve"]]
                label = None if number else method
                style = {"color": f"C{methods.index(method)}", "ls": "-" if is_ours(method) else ":"}
                axis.plot(*zip(*points, strict=True), lw=0.9, label=label, **style)
        axis.axhline(task.target, color="black", lw=0.5)
        axis.set(title=name, xlabel="CPU seconds, without evaluations", ylabel=task.measure, xscale="log")
        axis.set_yscale("linear" if task.measure == "test accuracy" else "log")
        axis.xaxis.set_minor_formatter("")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right upper", fontsize=8, title="dotted: rivals")
    return figure


def plot_jitter(result: Result) -> Any:
    """Returns the distribution of step times in multiples of the median: a flat line is an even run."""
    rows = [row for row in result.document["rows"] if not row["failure"]]
    parts = list(groups(rows, "model"))
    figure, axes = _figure(len(parts), 3.6)
    names = list(dict.fromkeys((row["optimizer"], row["refresh"]) for row in rows))
    for axis, ((model,), of_model) in zip(axes, parts, strict=True):
        for row in of_model:
            name = (row["optimizer"], row["refresh"])
            times = [ms / row["p50"] for ms in row["percentiles"]]
            style = {"color": f"C{names.index(name)}", "ls": "-" if name[0].startswith("ngd") else ":"}
            axis.plot(times, label=" ".join(name), lw=1.6 if row["aims"] else 0.9, **style)
        axis.axhline(1.25, color="black", lw=0.5)
        axis.set(title=model, xlabel="per cent of the steps", ylabel="time over the median", yscale="log")
    axes[0].legend(fontsize=6)
    return figure


PLOTS: dict[str, Callable[[Result], Any]] = {
    "step-overhead": plot_overhead,
    "step-jitter": plot_jitter,
    "memory": plot_memory,
    "methods": plot_curves,
}
