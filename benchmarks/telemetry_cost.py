"""How much CPU time does telemetry add to a step of NGD?

Four copies of one training take turns step by step, with the same weights and batches throughout, in one thread, on the
clock of this process's CPU time: one tells nothing; one makes the record of each step and its JSON, as all jobs do; one
also watches its layers and reads the resources of its process, as all jobs do too; and one tells nothing again, whose
distance from the first is the error of the measurement. A block is 32 steps after step 256, of which one is watched;
the figure is the median over blocks of the time beyond that of the first. "begin" is the same of steps 16 to 255, of
which 16 are watched. "phase" is the part that the optimizer's own clock sees, without the error of a difference: its
phase `telemetry`, in which spectra are estimated and all is sent, over the step; once for the blocks, once for "begin".

    python -m benchmarks.telemetry_cost  # ten minutes
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.models import batches, model_of
from benchmarks.record import folder_for, write
from ngd_dist import NGD, NGDConfig
from ngd_dist.config import EKFAC
from ngd_dist.distributed.comm import Communicator
from ngd_dist.step.layer_watch import LONGEST
from ngd_dist.telemetry import Stopwatch
from ngd_workers.contract.events import StepRecord, Steps
from ngd_workers.train.ranks import RankWatch, Usage
from ngd_workers.train.records import phases_of, step_record

CASES = ("none", "record", "all", "none again")
PLANS = {
    "mlp": (256, NGDConfig()),
    "resnet20": (32, NGDConfig()),
    "mlp, ekfac": (256, NGDConfig(preconditioner=EKFAC())),
}
GATHERED = 64  # records in an event, as the reporter gathers them
EARLY, LATE = 16, 256


class Training:
    """One copy of the training, with the telemetry of its case."""

    def __init__(self, plan: str, case: str) -> None:
        self._batch, config = PLANS[plan]
        name = plan.partition(",")[0]
        self._model, self._stream = model_of(name), batches(name, self._batch)
        self._optimizer = NGD(self._model, config)
        self._tells, self._watches = case in ("record", "all"), case == "all"
        self._records: list[StepRecord] = []
        self._ranks: RankWatch | None = None
        self.phase = 0.0  # seconds
        if self._watches:
            self._optimizer.watch()
            self._ranks = RankWatch(Communicator(None), Usage(torch.device("cpu")))

    def step(self) -> float:
        """Returns the CPU seconds of one step, without the drawing of its batch."""
        x, y = next(self._stream)
        start = time.process_time()
        told = self._ranks.incoming(self._ranks.outgoing()) if self._ranks else None
        self._optimizer.zero_grad()
        nn.functional.cross_entropy(self._model(x), y).backward()
        self._optimizer.step()
        self.phase += self._optimizer.stats.seconds.get("telemetry", 0.0)
        if self._tells:
            self._tell(told)
        return time.process_time() - start

    def _tell(self, told: Any) -> None:
        phases = phases_of(self._optimizer, {"data": 0.0, "forward_backward": 0.0, "loss_reduce": 0.0, "update": 0.0})
        if self._ranks:
            self._ranks.add(phases)
        number = self._optimizer.stats.step
        record = step_record(
            self._optimizer, step=number, epoch=0.0, metrics={"loss": 1.0, "accuracy": 0.5}, samples_per_s=1.0,
            seconds=phases, bytes_sent={"gradients": 0}, skipped_samples=0, bytes_so_far=0, ranks=told,
        )  # fmt: skip
        self._records.append(record)
        if len(self._records) == GATHERED:
            Steps(records=self._records).model_dump_json()
            self._records = []


def in_turns(trainings: dict[str, Training], steps: int) -> dict[str, float]:
    """Returns the CPU seconds of so many steps of each, which take turns in turning order."""
    spent, names = dict.fromkeys(trainings, 0.0), list(trainings)
    for number in range(steps):
        for place in range(len(names)):
            name = names[(number + place) % len(names)]
            spent[name] += trainings[name].step()
    return spent


def rows_of(plan: str, blocks: int) -> list[dict[str, Any]]:
    """Returns a row for each case but the first."""
    trainings = {case: Training(plan, case) for case in CASES}
    in_turns(trainings, EARLY - 1)
    before = {case: training.phase for case, training in trainings.items()}
    begin = in_turns(trainings, LATE - EARLY)
    middle = {case: training.phase for case, training in trainings.items()}
    of_blocks = [in_turns(trainings, LONGEST) for _ in range(blocks)]

    rows = []
    for case in CASES[1:]:
        shares = [spent[case] / spent["none"] - 1 for spent in of_blocks]
        rows.append(
            {
                "plan": plan,
                "batch": PLANS[plan][0],
                "case": case,
                "step_ms": 1e3 * statistics.median(spent["none"] for spent in of_blocks) / LONGEST,
                "share": statistics.median(shares),
                "spread": [min(shares), max(shares)],
                "begin": begin[case] / begin["none"] - 1,
                "phase": (trainings[case].phase - middle[case]) / sum(spent["none"] for spent in of_blocks),
                "phase_begin": (middle[case] - before[case]) / begin["none"],
                "blocks": blocks,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows in Markdown."""
    lines = ["# What telemetry adds to a step", "", (__doc__ or "").split("\n\n    ")[0], ""]
    lines += ["| training | batch | step | telemetry | adds | least to most | begin | phase | at begin |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        least, most = row["spread"]
        named = f"{row['plan']} | {row['batch']} | {row['step_ms']:.1f} ms | {row['case']}"
        lines.append(
            f"| {named} | {100 * row['share']:.2f} % | "
            f"{100 * least:.2f} to {100 * most:.2f} % | {100 * row['begin']:.2f} % | "
            f"{100 * row['phase']:.2f} % | {100 * row['phase_begin']:.2f} % |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", nargs="+", choices=list(PLANS), default=list(PLANS))
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--hardware", help="last word in the name of the result's folder; none: nothing is written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    Stopwatch.clock = time.process_time
    rows = [row for plan in arguments.plans for row in rows_of(plan, arguments.blocks)]
    print(table(rows))
    if arguments.hardware:
        folder: Path = folder_for("telemetry-cost", arguments.hardware)
        write(folder, {"rows": rows}, table(rows))


if __name__ == "__main__":
    main()
