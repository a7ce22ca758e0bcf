"""Writes docs/performance.md and its plots from benchmarks/results: the newest result of each question.

python -m benchmarks.report
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.exact.plots import FIGURES
from benchmarks.methods.document import compared, document
from benchmarks.methods.tasks import TASKS
from benchmarks.plots import has_plot, parts_of, plots
from benchmarks.reading import Result, compared_in, groups, is_ours, medians
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
REFRESHES = {
    "1/1": "all new at every step",
    "1/10": "statistics at every step, inverses at each tenth",
    "10/10": "all new at each tenth step",
    "adaptive": "new when they have changed",
}


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
    title, _, aims = TARGETS.read_text().strip().partition("\n")
    sections = [INTRODUCTION, *([overview(compared)] if compared else []), f"{title}\n\n{folded(aims)}"]
    for result in results:
        body = "\n".join(TABLES.get(result.question, readme)(result))
        figure = [f"![{QUESTIONS[result.question]}]({result.plot})"] if has_plot(result) else []
        figure += [f"![{FIGURES[part][0]}]({result.plot_of(part)})" for part in parts_of(result)]
        heading = f"## {QUESTIONS[result.question]} ({result.hardware})"
        sections.append("\n\n".join([heading, *figure, folded(body), _facts(result)]) + "\n")
    missing = [question for question in QUESTIONS if question not in {result.question for result in results}]
    if missing:
        sections.append(f"Not measured yet: {', '.join(missing)}.\n")
    return "\n".join(sections)


def folded(text: str) -> str:
    """Returns Markdown that opens on a click, here and where the repository is read."""
    return f'<details markdown="1">\n<summary>Tables</summary>\n\n{text.strip()}\n\n</details>\n'


def methods_page(results: list[Result]) -> str:
    """Returns docs/methods.md."""
    of = {result.question: result for result in results}
    approximations = "\n".join(readme(of["approximations"])) if "approximations" in of else ""
    if "methods" not in of:
        return document(approximations, "")
    result = of["methods"]
    figure, conclusion = f"performance/overview_{result.hardware}.svg", result.folder / "conclusion.md"
    return document(approximations, compared(result.document["rows"], conclusion.read_text(), figure))


def overview(result: Result) -> str:
    """Returns the table for a person who reads nothing else, and its plot."""
    rows = result.document["rows"]
    trials = Counter((row["task"], row["method"]) for row in rows if row["part"] == "tuned")
    heading = f"{QUESTIONS[result.question]} ({result.hardware})"
    anchor = re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-")
    lines = [OVERVIEW.format(trials=", ".join(map(str, sorted(set(trials.values())))), anchor=anchor)]
    lines += ["| task | ours, seconds | best rival, seconds | ours, steps | rival with the fewest steps |"]
    lines += ["|---|---|---|---|---|"]
    for (name,), of_task in groups([row for row in rows if row["part"] == "repeated"], "task"):
        seconds, steps = (medians(of_task, what) for what in ("target_seconds", "target_step"))
        cells = [TASKS[name].title, *_best_ones(seconds, 1), *_best_ones(steps)]
        lines.append(f"| {' | '.join(cells)} |")
    picture = f"![Ours over the best rival, steps and seconds](performance/headline_{result.hardware}.svg)"
    return "\n".join([*lines, "", picture, ""])


def _best_ones(medians: dict[str, float], digits: int = 0) -> Iterator[str]:
    """Yields the least figure of ours, and the rivals', each with its method."""
    for side in (True, False):
        methods = [method for method in medians if is_ours(method) is side]
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
    for (model, batch, ranks), rows in groups(document["rows"], "model", "batch", "ranks"):
        refreshes = [r for r in ("1/1", "1/10", "10/10", "adaptive") if any(row["refresh"] == r for row in rows)]
        lines += [f"### {model}, batch {batch}, {ranks} rank{'s' * (ranks > 1)}, times SGD", ""]
        lines += [f"SGD's step takes {rows[0]['sgd_ms']:.1f} ms. In brackets: least and most of the blocks.", ""]
        lines += [f"| optimizer | {' | '.join(REFRESHES[r] for r in refreshes)} |"]
        lines += ["|---" * (len(refreshes) + 1) + "|"]
        for (name,), of_optimizer in groups(rows, "optimizer"):
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


TABLES: dict[str, Callable[[Result], list[str]]] = {"step-overhead": step_overhead}


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
