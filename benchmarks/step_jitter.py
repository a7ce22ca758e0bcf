"""How even are the steps?

The table has p50, p95 and p99 of a training step's time over 1,000 steps of the MLP 784-512-512-512-10 and 200 of
ResNet-20, batch 256, one thread. Ours runs with every way to spread refreshes, every importable rival at its longest
interval. The clock is this process's CPU time, without the drawing of batches. The optimizers take turns, a block of
steps each, so that the machine may be shared. If a run is repeated, from equal weights on equal batches, a step's time
is the least of its repeats, which do the same work. A busy neighbour still adds some time to every row: "sgd" shows how
much. p99 over p50 is given for all steps, and as least and most of their quarters.

    python -m benchmarks.step_jitter            # an hour or more
    PYTHONPATH=<kfac-pytorch> python -m benchmarks.step_jitter --models mlp --only "sgd 1/1" "ngd 10/10"
"""

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.models import batches, model_of
from benchmarks.peers import PEERS, Peer, Refresh, Setting, ngd, why_not
from benchmarks.record import folder_for, write
from benchmarks.rivals import RIVALS
from benchmarks.trainer import Training
from ngd_dist.config import KFAC

BLOCK = 20  # steps of one optimizer before the next one's turn: two cycles of the longest fixed interval
QUARTERS = 4
TARGET = 1.25  # of p99 over p50, for those rows of ours that have `aims`

Make = Callable[[torch.nn.Module, Setting], Training]


@dataclass(frozen=True)
class Row:
    """One optimizer at one interval. `aims`: whether the target is set for it."""

    name: str
    refresh: Refresh
    build: Make
    aims: bool = False

    @property
    def label(self) -> str:
        return f"{self.name} {self.refresh}"


@dataclass(frozen=True)
class Plan:
    """One model: steps on the clock, steps before it starts, and how often all of them are repeated."""

    model: str
    steps: int
    settle: int
    repeats: int = 1
    batch: int = 256


ROWS = ngd(preconditioner=KFAC(rows=128))
OURS = (
    Row("ngd", "1/1", ngd().build),
    Row("ngd, all layers at once", "10/10", ngd(stagger=0.0).build),
    Row("ngd, capped alone", "10/10", ngd(stagger=0.0, refresh_cap=0.2).build),
    Row("ngd", "10/10", ngd().build, aims=True),
    Row("ngd", "adaptive", ngd().build, aims=True),
    Row("ngd rows 128", "10/10", ROWS.build, aims=True),
    Row("ngd rows 128", "adaptive", ROWS.build, aims=True),
)
PLANS = (Plan("mlp", 1000, 100, repeats=2), Plan("resnet20", 200, 40))


def rows(rivals: Mapping[str, Peer]) -> list[Row]:
    """Returns SGD, ours, and those of the rivals that can run here, each at its longest interval."""
    rivals = {"sgd": RIVALS["sgd"], **rivals}
    runnable = [Row(name, peer.refreshes[-1], peer.build) for name, peer in rivals.items() if not why_not(name)]
    return [*(row for row in runnable if row.name == "sgd"), *OURS, *(row for row in runnable if row.name != "sgd")]


class Case:
    """One row: each repeat has a new model and the same stream of batches."""

    def __init__(self, row: Row, plan: Plan) -> None:
        self.row, self.plan = row, plan
        self.failure: str | None = None
        self.seconds: list[list[float]] = [[] for _ in range(plan.repeats)]
        setting = Setting(row.refresh)
        self.runs = [(row.build(model_of(plan.model), setting), batches(plan.model, plan.batch)) for _ in self.seconds]

    def run(self, steps: int, clock: Callable[[], float]) -> None:
        """Takes these steps in each repeat; a rival that raises is a row that says so."""
        if self.failure:
            return
        try:
            for (trainer, stream), seconds in zip(self.runs, self.seconds, strict=True):
                for _ in range(steps):
                    x, y = next(stream)
                    start = clock()
                    trainer.run(x, y)
                    seconds.append(clock() - start)
        except Exception as error:  # noqa: BLE001 - a rival may raise anything
            self.failure = f"{type(error).__name__}: {error}"[:150]

    def settle(self, clock: Callable[[], float]) -> None:
        """Takes the steps that do not count."""
        self.run(self.plan.settle, clock)
        for seconds in self.seconds:
            seconds.clear()

    def result(self) -> dict[str, Any]:
        """Returns the row's figures, in milliseconds; `percentiles` are 0 to 100."""
        figures: dict[str, Any] = {"model": self.plan.model, "optimizer": self.row.name, "refresh": self.row.refresh}
        figures |= {"aims": self.row.aims, "steps": self.plan.steps, "repeats": self.plan.repeats}
        figures["failure"] = self.failure
        if self.failure:
            return figures
        ms = [1e3 * min(times) for times in zip(*self.seconds, strict=True)]
        size = math.ceil(len(ms) / QUARTERS)
        quarters = [jitter(ms[first : first + size]) for first in range(0, len(ms), size)]
        return figures | {
            **{f"p{q}": percentile(ms, q) for q in (50, 95, 99)},
            "jitter": jitter(ms),
            "spread": [min(quarters), max(quarters)],
            "percentiles": [round(percentile(ms, q), 3) for q in range(101)],
        }


def percentile(values: Sequence[float], q: float) -> float:
    """Returns the least value that q per cent of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(q / 100 * len(values)) - 1)]


def jitter(values: Sequence[float]) -> float:
    return percentile(values, 99) / percentile(values, 50)


def measure(plan: Plan, wanted: Sequence[Row], clock: Callable[[], float] = time.process_time) -> list[dict[str, Any]]:
    """Returns the figures of each row, whose optimizers take turns."""
    cases = [Case(row, plan) for row in wanted]
    for case in cases:
        case.settle(clock)
    for first in range(0, plan.steps, BLOCK):
        for case in cases:
            case.run(min(BLOCK, plan.steps - first), clock)
    return [case.result() for case in cases]


# --- tables -----------------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """Returns the whole result in Markdown."""
    lines = ["# How even the steps are", "", (__doc__ or "").split("\n\n", 1)[1].split("\n\n    ")[0], ""]
    lines += [f"The target: p99 at most {TARGET} times p50, in the rows marked with *.", ""]
    for model in dict.fromkeys(row["model"] for row in result["rows"]):
        of_model = [row for row in result["rows"] if row["model"] == model]
        lines += [f"## {model}, {of_model[0]['steps']} steps, {of_model[0]['repeats']} times", ""]
        lines += ["| optimizer | refresh | p50 ms | p95 ms | p99 ms | p99 / p50 | of quarters |", "|---" * 7 + "|"]
        lines += [_line(row) for row in of_model] + [""]
    lines += [f"Left out: {name}: {reason}." for name, reason in result["left_out"].items()]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    name = f"{row['optimizer']}{' *' if row['aims'] else ''}"
    if row["failure"]:
        return f"| {name} | {row['refresh']} | fails | | | | {row['failure']} |"
    times = " | ".join(f"{row[key]:.1f}" for key in ("p50", "p95", "p99"))
    least, most = row["spread"]
    return f"| {name} | {row['refresh']} | {times} | {row['jitter']:.2f} | {least:.2f} to {most:.2f} |"


def run(plans: Sequence[Plan], wanted: Sequence[Row]) -> dict[str, Any]:
    """Returns the result of all plans, and the optimizers left out with the reasons."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for plan in plans:
        print(f"{plan.model}: {plan.steps} steps of {len(wanted)} optimizers", flush=True)
        rows += measure(plan, wanted)
    return {"rows": rows, "left_out": {name: reason for name in PEERS if (reason := why_not(name))}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[plan.model for plan in PLANS])
    parser.add_argument("--only", nargs="+", help="rows by optimizer and refresh, as in 'ngd 10/10'; default: all")
    parser.add_argument("--repeats", type=int, help="default: 2 for the MLP")
    parser.add_argument("--hardware", default="cpu2", help="last word in the name of the result's folder")
    arguments = parser.parse_args()
    wanted = [row for row in rows(RIVALS) if row.label in (arguments.only or [row.label])]
    plans = [plan for plan in PLANS if plan.model in arguments.models]
    result = run([replace(plan, repeats=arguments.repeats or plan.repeats) for plan in plans], wanted)
    write(folder_for("step-jitter", arguments.hardware), result, table(result))
    print(table(result))


if __name__ == "__main__":
    main()
