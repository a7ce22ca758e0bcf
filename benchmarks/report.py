"""Writes docs/performance.md and its plots from benchmarks/results: the newest result of each question.

python -m benchmarks.report
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.exact.plots import FIGURES
from benchmarks.methods.catalogue import METHODS
from benchmarks.methods.document import compared, document
from benchmarks.methods.protocol import median_of
from benchmarks.methods.tasks import TASKS
from benchmarks.record import RESULTS
from benchmarks.step_overhead import targets_table

__all__ = ["Result", "methods_page", "newest", "page", "plots"]

DOCS = Path(__file__).parent.parent / "docs"
TARGETS = Path(__file__).parent / "targets.md"  # by hand: what no result tells by itself
QUESTIONS = {
    "step-overhead": "Time of a training step beside SGD's",
    "step-jitter": "How even the steps are",
    "methods": "Steps and seconds to a target",
    "approximations": "How near approximations come",
    "steps-to-target": "Steps and seconds to a target, by an earlier search",
    "inversion": "Inverting the factors of real models",
    "comm-volume": "Bytes between ranks",
    "memory": "Bytes that training holds",
    "exact": "Small models, treated exactly",
    "crossover": "Which inversion is the faster, by width",
    "profile": "Where the time goes",
    "gpu-suite": "On a GPU",
}
INTRODUCTION = """# Performance

Made by `python -m benchmarks.report` from `benchmarks/results/`; each question's command measures its baseline in the
same run. Losing rows are shown. `make bench` measures again.
"""
OVERVIEW = """How long until a model is as good as it should be? The best of this package's methods beside the best
of its rivals, from SGD to SOAP: CPU seconds in one thread and optimizer steps, medians of three seeds. On each task
every method had the same number of trials ({trials}) of the same search; the setting with the fewest seconds counts.
[Every method and trial](#{anchor}) is below.
"""
PLOTS_A_LINE = 3
REFRESHES = {
    "1/1": "all new at every step",
    "1/10": "statistics at every step, inverses at each tenth",
    "10/10": "all new at each tenth step",
    "adaptive": "new when they have changed",
}


@dataclass(frozen=True)
class Result:
    """One folder of benchmarks/results: <date>_<question>_<hardware>."""

    folder: Path

    @property
    def question(self) -> str:
        return self.folder.name.split("_")[1]

    @property
    def document(self) -> dict[str, Any]:
        path = self.folder / "result.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    @property
    def hardware(self) -> str:
        return self.folder.name.split("_", 2)[2]

    @property
    def plot(self) -> str:
        return f"performance/{self.question}_{self.hardware}.svg"

    def plot_of(self, part: str) -> str:
        return f"performance/{self.question}-{part}_{self.hardware}.svg"


def newest(root: Path = RESULTS) -> list[Result]:
    """Returns the newest result of each question on each hardware, in the order of QUESTIONS."""
    newest: dict[tuple[str, str], Result] = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        result = Result(folder)
        newest[result.question, result.hardware] = result
    order = list(QUESTIONS)
    return sorted((r for r in newest.values() if r.question in QUESTIONS), key=lambda r: order.index(r.question))


def page(results: list[Result]) -> str:
    """Returns docs/performance.md. A question without a result is named at the end."""
    compared = compared_in(results)
    sections = [INTRODUCTION, *([overview(compared), TARGETS.read_text()] if compared else [])]
    for result in results:
        body = "\n".join(TABLES.get(result.question, readme)(result))
        figure = [f"![{QUESTIONS[result.question]}]({result.plot})"] if _has_plot(result) else []
        figure += [f"![{FIGURES[part][0]}]({result.plot_of(part)})" for part in parts_of(result)]
        heading = f"## {QUESTIONS[result.question]} ({result.hardware})"
        sections.append("\n\n".join([heading, body, *figure, _facts(result)]) + "\n")
    missing = [question for question in QUESTIONS if question not in {result.question for result in results}]
    if missing:
        sections.append(f"Not measured yet: {', '.join(missing)}.\n")
    return "\n".join(sections)


def methods_page(results: list[Result]) -> str:
    """Returns docs/methods.md."""
    of = {result.question: result for result in results}
    approximations = "\n".join(readme(of["approximations"])) if "approximations" in of else ""
    if "methods" not in of:
        return document(approximations, "")
    result = of["methods"]
    figure, conclusion = f"performance/overview_{result.hardware}.svg", result.folder / "conclusion.md"
    return document(approximations, compared(result.document["rows"], conclusion.read_text(), figure))


def compared_in(results: list[Result]) -> Result | None:
    """Returns the newest comparison of methods by seconds and steps to their targets."""
    return next((result for result in results if result.question in ("methods", "steps-to-target")), None)


def _is_ours(method: str) -> bool:
    """Returns whether the method is this package's; in the earlier search K-FAC's rows were called ngd."""
    return method.startswith("ngd") or METHODS[method].is_ours


def overview(result: Result) -> str:
    """Returns the table for a person who reads nothing else, and its plot."""
    rows = result.document["rows"]
    trials = Counter((row["task"], row["method"]) for row in rows if row["part"] == "tuned")
    heading = f"{QUESTIONS[result.question]} ({result.hardware})"
    anchor = re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-")
    lines = [OVERVIEW.format(trials=", ".join(map(str, sorted(set(trials.values())))), anchor=anchor)]
    lines += ["| task | ours, seconds | best rival, seconds | ours, steps | rival with the fewest steps |"]
    lines += ["|---|---|---|---|---|"]
    for (name,), of_task in _groups([row for row in rows if row["part"] == "repeated"], "task"):
        seconds, steps = (_medians(of_task, what) for what in ("target_seconds", "target_step"))
        cells = [TASKS[name].title, *_best_ones(seconds, 1), *_best_ones(steps)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"![CPU seconds to each target](performance/overview_{result.hardware}.svg)", ""])


def _medians(rows: list[dict[str, Any]], what: str) -> dict[str, float]:
    return {method: median_of(of_method, what) for (method,), of_method in _groups(rows, "method")}


def _best_ones(medians: dict[str, float], digits: int = 0) -> Iterator[str]:
    """Yields the least figure of ours, and the rivals', each with its method."""
    for is_ours in (True, False):
        methods = [method for method in medians if _is_ours(method) is is_ours]
        best = min(methods, key=medians.__getitem__, default="")
        is_reached = math.isfinite(medians.get(best, math.inf))
        yield f"{medians[best]:.{digits}f} ({best})" if is_reached else "not reached"


def _facts(result: Result) -> str:
    environment = result.document.get("environment", {})
    facts = ", ".join(f"{key} {value}" for key, value in environment.items())
    return f"From `benchmarks/results/{result.folder.name}`" + (f": {facts}." if facts else ".")


def readme(result: Result) -> list[str]:
    """Returns the benchmark's README, one heading level down, without its title and facts."""
    lines = (result.folder / "README.md").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("# ", "Measured on: "))]
    return "\n".join(re.sub(r"^#", "##", line) for line in kept).strip().splitlines()


def step_overhead(result: Result) -> list[str]:
    """Returns ours beside the targets, then one table per model and batch with a column per refresh."""
    document, lines = result.document, list[str]()
    if document["targets"]:
        lines += ["### Ours beside the targets", "", *targets_table(document["targets"]), ""]
    for (model, batch, ranks), rows in _groups(document["rows"], "model", "batch", "ranks"):
        refreshes = [r for r in ("1/1", "1/10", "10/10", "adaptive") if any(row["refresh"] == r for row in rows)]
        lines += [f"### {model}, batch {batch}, {ranks} rank{'s' * (ranks > 1)}, times SGD", ""]
        lines += [f"SGD's step takes {rows[0]['sgd_ms']:.1f} ms. In brackets: least and most of the blocks.", ""]
        lines += [f"| optimizer | {' | '.join(REFRESHES[r] for r in refreshes)} |"]
        lines += ["|---" * (len(refreshes) + 1) + "|"]
        for (name,), of_optimizer in _groups(rows, "optimizer"):
            cells = {row["refresh"]: _ratio(row) for row in of_optimizer}
            lines.append(f"| {name} | {' | '.join(cells.get(r, '') for r in refreshes)} |")
        lines.append("")
    for row in document["sampling"]:
        steps = ", ".join("not reached" if s is None else str(s) for s in row["steps"])
        setting = f"{row['model']}, refresh {row['refresh']}, lr {row['lr']}"
        lines.append(f"- Steps to the same loss on {setting}, {row['optimizer']}: {steps}")
    lines += ["", *(f"- Left out: {name}: {reason}" for name, reason in document["left_out"].items())]
    return [*lines, "", document["note"]] if "note" in document else lines


def _ratio(row: dict[str, Any]) -> str:
    if row["ratio"] is None:
        return f"fails: {row['failure'].split(':')[0]}"
    return f"{row['ratio']:.2f} ({row['spread'][0]:.2f} to {row['spread'][1]:.2f})"


def _groups(rows: list[dict[str, Any]], *keys: str) -> Iterator[tuple[tuple[Any, ...], list[dict[str, Any]]]]:
    for values in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        yield values, [row for row in rows if tuple(row[key] for key in keys) == values]


TABLES: dict[str, Callable[[Result], list[str]]] = {"step-overhead": step_overhead}


# --- plots ------------------------------------------------------------------------------------------------------------


def plots(results: list[Result], folder: Path) -> list[Path]:
    """Draws the plots that the page shows, as SVG; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    # The same result gives the same file, so that the repository sees a change only if a figure changes.
    matplotlib.rcParams.update({"svg.hashsalt": "ngd", "svg.fonttype": "none", "font.size": 9})
    drawn = []
    for result in (result for result in results if _has_plot(result)):
        figure = PLOTS[result.question](result)
        path = folder / result.plot
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
        drawn.append(path)
    for result, part in [(each, part) for each in results for part in parts_of(each)]:
        figure, axes = _figure(2, 3.4)
        FIGURES[part][1](axes, result.document[part])
        path = folder / result.plot_of(part)
        figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
        drawn.append(path)
    if result := compared_in(results):
        path = folder / f"performance/overview_{result.hardware}.svg"
        plot_overview(result).savefig(path, metadata={"Date": None}, bbox_inches="tight")
        drawn.append(path)
    return drawn


def parts_of(result: Result) -> list[str]:
    """Returns the parts of the exact methods' result that have a figure each, for the page and for the guides."""
    document = result.document if result.question == "exact" else {}
    return [part for part in FIGURES if part in document]


def _has_plot(result: Result) -> bool:
    needs = {"methods": "curves.json"}.get(result.question, "result.json")
    return result.question in PLOTS and (result.folder / needs).exists()


def _figure(columns: int, height: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * columns + 1.5, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def plot_overview(result: Result) -> Any:
    """Returns bars of the CPU seconds to each target, ours in another colour; a method without a bar missed it."""
    from matplotlib.figure import Figure

    rows = [row for row in result.document["rows"] if row["part"] == "repeated"]
    groups = list(_groups(rows, "task"))
    lines = math.ceil(len(groups) / PLOTS_A_LINE)
    height = 0.7 + 0.17 * max(len({row["method"] for row in of_task}) for _, of_task in groups)
    figure = Figure(figsize=(4.4 * min(PLOTS_A_LINE, len(groups)), height * lines), layout="constrained")
    axes = figure.subplots(lines, min(PLOTS_A_LINE, len(groups)), squeeze=False).flatten()
    for axis in axes[len(groups) :]:
        axis.remove()
    for axis, ((name,), of_task) in zip(axes, groups, strict=False):
        seconds = sorted(_medians(of_task, "target_seconds").items(), key=lambda item: -item[1])
        lengths = [value if math.isfinite(value) else 0.0 for _, value in seconds]
        colours = ["#3949ab" if _is_ours(method) else "#b0bec5" for method, _ in seconds]
        bars = axis.barh([method for method, _ in seconds], lengths, color=colours)
        axis.bar_label(bars, [f"{value:.1f}" if math.isfinite(value) else "missed" for _, value in seconds], padding=2)
        axis.set(xlabel="CPU seconds to the target", xlim=(0, 1.2 * max(lengths, default=1)))
        axis.set_title(TASKS[name].title.replace(", ", ",\n", 1), fontsize=8)
        axis.tick_params(axis="y", labelsize=7)
    return figure


def plot_overhead(result: Result) -> Any:
    """Returns bars of times SGD at the smallest batch and the fewest ranks, ours in another colour."""
    rows = [row for row in result.document["rows"] if row["ratio"]]
    fewest = min(row["ranks"] for row in rows)
    rows = [row for row in rows if row["ranks"] == fewest]
    smallest = min(row["batch"] for row in rows)
    groups = list(_groups([row for row in rows if row["batch"] == smallest], "model"))
    figure, axes = _figure(len(groups), 0.16 * max(len(of_model) for _, of_model in groups) + 1)
    for axis, ((model,), of_model) in zip(axes, groups, strict=True):
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
    groups = list(_groups(rows, "model"))
    figure, axes = _figure(len(groups), 0.2 * max(len(of_model) for _, of_model in groups) + 1.5)
    for axis, ((model,), of_model) in zip(axes, groups, strict=True):
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
    groups = list(_groups(runs, "task"))
    figure, axes = _figure(len(groups), 3.2)
    methods = list(dict.fromkeys(run["method"] for run in runs))
    for axis, ((name,), of_task) in zip(axes, groups, strict=True):
        task = TASKS[name]
        for (method,), of_method in _groups(of_task, "method"):
            for number, run in enumerate(of_method):
                points = [(point["seconds"], point["score"]) for point in run["curve"]]
                label = None if number else method
                axis.plot(*zip(*points, strict=True), color=f"C{methods.index(method)}", lw=0.8, label=label)
        axis.axhline(task.target, color="black", lw=0.5)
        axis.set(title=name, xlabel="CPU seconds, without evaluations", ylabel=task.measure, xscale="log")
        axis.set_yscale("linear" if task.measure == "test accuracy" else "log")
    axes[0].legend(fontsize=7)
    return figure


def plot_jitter(result: Result) -> Any:
    """Returns the distribution of step times in multiples of the median: a flat line is an even run."""
    rows = [row for row in result.document["rows"] if not row["failure"]]
    groups = list(_groups(rows, "model"))
    figure, axes = _figure(len(groups), 3.6)
    names = list(dict.fromkeys((row["optimizer"], row["refresh"]) for row in rows))
    for axis, ((model,), of_model) in zip(axes, groups, strict=True):
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


def main() -> None:
    results = newest()
    (DOCS / "performance.md").write_text(page(results))
    (DOCS / "methods.md").write_text(methods_page(results))
    try:
        drawn = plots(results, DOCS)
    except ImportError as error:
        raise SystemExit(f"wrote performance.md, but not its plots: {error}; install the extra bench") from error
    print(f"wrote docs/performance.md and {len(drawn)} plots")


if __name__ == "__main__":
    main()
