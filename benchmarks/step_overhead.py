"""How long does one training step take, compared with SGD's?

Ours and every importable rival run on the MLP 784-512-512-512-10 and ResNet-20, in this process with one thread. Blocks
of steps alternate with blocks of SGD with momentum; a block's ratio is to the SGD blocks just before and after it. The
clock is this process's CPU time, so that the machine may be shared, without the drawing of batches. The figure is the
median over blocks; a block spans a whole refresh cycle, so that its mean holds each refresh's share. The row "sgd" is
SGD against itself: its distance from 1 is the error of the measurement.

    python -m benchmarks.step_overhead                # CPU: some ten minutes
    python -m benchmarks.step_overhead --device cuda  # ResNet-50 and ViT-B/16 in bfloat16
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.models import batches, model_of
from benchmarks.peers import PEERS, Refresh, Trainer, build, refreshes, why_not
from benchmarks.ranks import on_ranks
from benchmarks.record import folder_for, write
from ngd_dist import NGD
from ngd_dist.errors import NonFiniteError

CYCLE = 10  # steps of the longest fixed interval
DENSE = ("kfac-pytorch eigen", "kfac-pytorch inverse", "asdl kfac", "asdl kfac 1mc", "dp-kfac inverse")
DENSE += ("curvlinops kfac", "singd dense")

# The most that ours may cost at batch 256, in one thread: exact K-FAC, without sampling. Beside it stands half the
# overhead of this run's best dense K-FAC. On a GPU, a tenth of SGD's step.
TARGETS: dict[tuple[str, Refresh], float] = {
    ("mlp", "1/1"): 2.5,
    ("mlp", "1/10"): 2.2,
    ("mlp", "10/10"): 1.9,
    ("resnet20", "1/1"): 2.2,
    ("resnet20", "1/10"): 1.8,
    ("resnet20", "10/10"): 1.12,
    ("resnet50", "adaptive"): 1.10,
    ("vit_b16", "adaptive"): 1.10,
}


@dataclass(frozen=True)
class Plan:
    """One model and batch, and the length of its measurement: blocks, and steps of a block if there is no cycle.

    settle: steps that an adaptive schedule takes before the clock starts.
    """

    model: str
    batch: int
    blocks: int
    steps: int
    settle: int
    names: Sequence[str] = tuple(PEERS)


FEW = ("sgd", "ngd", "ngd rows 256", "ngd rows 64", "kfac-pytorch inverse", "asdl kfac", "singd dense")
FEW += ("torchzero soap",)
PLANS = (
    Plan("mlp", 256, blocks=3, steps=3, settle=40),
    Plan("resnet20", 256, blocks=3, steps=1, settle=25),
    Plan("mlp", 2048, blocks=3, steps=1, settle=25, names=FEW),
    Plan("resnet20", 2048, blocks=2, steps=1, settle=10, names=FEW[:5]),
)
RANKS_NAMES = ("sgd", "ngd", "ngd rows 64", "kfac-pytorch eigen", "kfac-pytorch inverse", "dp-kfac inverse")


class Case:
    """One optimizer with its own copy of the model and the same stream of batches as every other."""

    def __init__(self, trainer: Trainer, refresh: Refresh, stream: Iterator[tuple[Tensor, Tensor]]) -> None:
        self.trainer, self.refresh, self.stream = trainer, refresh, stream
        self.ratios: list[float] = []
        self.seconds: list[float] = []
        self.refreshed: list[float] = []
        self.loss = math.nan
        self.failure: str | None = None

    def block(self, steps: int, clock: Callable[[], float]) -> float:
        """Returns the mean seconds of one step; drawing the batches does not count."""
        drawn = [next(self.stream) for _ in range(steps)]
        start = clock()
        for x, y in drawn:
            loss = self.trainer.run(x, y)
            self._note()
        spent = clock() - start
        self.loss = float(loss)
        return spent / steps

    def settle(self, steps: int) -> None:
        """Takes the steps before the clock starts: the first builds state, the next begin an adaptive schedule."""
        self.block(steps, lambda: 0.0)
        self.refreshed.clear()

    def attempt(self, fn: Callable[..., float | None], *args: Any) -> float | None:
        """Returns fn(*args); on one rank a rival that raises is a row that says so, not the end of the run."""
        try:
            return fn(*args)
        except Exception as error:
            if torch.distributed.is_initialized():
                raise
            self.failure = f"{type(error).__name__}: {error}"[:150]
            return None

    def _note(self) -> None:
        optimizer = getattr(self.trainer, "holders", None)
        if isinstance(optimizer, NGD):
            self.refreshed.append(len(optimizer.stats.refreshes) / len(optimizer.stats.ages))

    def row(self, plan: Plan, sgd_seconds: float) -> dict[str, Any]:
        return {
            "model": plan.model,
            "batch": plan.batch,
            "optimizer": self.trainer.name,
            "refresh": self.refresh,
            "ratio": statistics.median(self.ratios) if self.ratios else None,
            "spread": [min(self.ratios, default=None), max(self.ratios, default=None)],
            "ms": 1e3 * statistics.median(self.seconds) if self.seconds else None,
            "sgd_ms": 1e3 * sgd_seconds,
            "blocks": len(self.ratios),
            "refreshed_share": statistics.fmean(self.refreshed) if self.refreshed else None,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "failure": self.failure,
        }


def measure(plan: Plan, clock: Callable[[], float], make: Callable[[str, Refresh], Case]) -> list[dict[str, Any]]:
    """Returns a row for each optimizer and refresh of the plan that can run here, without a loss if it diverges."""
    wanted = [(name, refresh) for name in plan.names if not why_not(name) for refresh in refreshes(name)]
    sgd, cases = make("sgd", "1/1"), [make(name, refresh) for name, refresh in wanted]
    for case in (sgd, *cases):
        case.attempt(case.settle, plan.settle if case.refresh == "adaptive" else 2)
    sgd_steps = max(2, plan.steps)
    for _ in range(plan.blocks):
        before = sgd.block(sgd_steps, clock)
        for case in (case for case in cases if not case.failure):
            steps = plan.steps if case.refresh == "1/1" else CYCLE * (2 if case.refresh == "adaptive" else 1)
            spent = case.attempt(case.block, steps, clock)
            after = sgd.block(sgd_steps, clock)
            if spent is not None:
                case.ratios.append(2 * spent / (before + after))
                case.seconds.append(spent)
            sgd.seconds.append(after)
            before = after
    return [case.row(plan, statistics.median(sgd.seconds)) for case in cases]


# --- one process, one thread ------------------------------------------------------------------------------------------


def on_cpu(plan: Plan) -> list[dict[str, Any]]:
    """Returns the plan's rows for one process with one thread."""
    torch.set_num_threads(1)

    def make(name: str, refresh: Refresh) -> Case:
        trainer = build(name, model_of(plan.model), refresh)
        return Case(trainer, refresh, batches(plan.model, plan.batch))

    return [{"ranks": 1, **row} for row in measure(plan, time.process_time, make)]


# --- two ranks --------------------------------------------------------------------------------------------------------


def on_two_ranks(plan: Plan) -> list[dict[str, Any]]:
    """Returns the plan's rows for two gloo ranks: CPU time of the busier one, to that of SGD under DDP."""
    by_rank = on_ranks(2, _rank_rows, plan)
    return [max(rows, key=lambda row: row["ratio"]) for rows in zip(*by_rank, strict=True)]


def _rank_rows(rank: int, world_size: int, plan: Plan) -> list[dict[str, Any]]:
    def make(name: str, refresh: Refresh) -> Case:
        trainer = build(name, DistributedDataParallel(model_of(plan.model)), refresh)
        return Case(trainer, refresh, batches(plan.model, plan.batch // world_size, seed=rank))

    return [{"ranks": world_size, **row} for row in measure(plan, time.process_time, make)]


# --- CUDA -------------------------------------------------------------------------------------------------------------

GPU_PLANS = (
    Plan("resnet50", 256, blocks=3, steps=5, settle=40, names=("sgd", "ngd", "adamw")),
    Plan("vit_b16", 256, blocks=3, steps=5, settle=40, names=("sgd", "ngd", "adamw")),
)


def on_cuda(plan: Plan, device: str = "cuda") -> list[dict[str, Any]]:
    """Returns the plan's rows for one GPU, models in bfloat16 autocast; times between two points of its queue."""

    def make(name: str, refresh: Refresh) -> Case:
        model = model_of(plan.model).to(device, memory_format=torch.channels_last)
        model.forward = torch.autocast(device, torch.bfloat16)(model.forward)  # type: ignore[method-assign]
        return Case(build(name, model, refresh), refresh, cycle(plan, device))

    return [{"ranks": 1, **row} for row in measure(plan, cuda_clock if device == "cuda" else time.perf_counter, make)]


def cycle(plan: Plan, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields a few batches over and over: drawing images takes a CPU longer than a step takes a GPU."""
    stream = batches(plan.model, plan.batch)
    kept = [(x.to(device, memory_format=torch.channels_last), y.to(device)) for x, y in (next(stream) for _ in "1234")]
    while True:
        yield from kept


def cuda_clock() -> float:
    """Returns the seconds at which the device has worked off all that is queued, by its own events."""
    if not _EVENTS:
        _EVENTS.append(torch.cuda.Event(enable_timing=True))
        _EVENTS[0].record()
    now = torch.cuda.Event(enable_timing=True)
    now.record()
    now.synchronize()
    return _EVENTS[0].elapsed_time(now) / 1e3


_EVENTS: list[Any] = []

# --- does sampling cost steps? ----------------------------------------------------------------------------------------

TARGET_LOSS = {"mlp": 0.9, "resnet20": 0.9}  # with a tenth of the labels wrong
OURS = ("ngd", "ngd rows 256", "ngd rows 128", "ngd rows 64")
# Refreshes and lr at which sampling is compared with the whole factors.
SAMPLED: dict[str, tuple[tuple[Refresh, float], ...]] = {
    "mlp": (("1/1", 0.01), ("1/1", 0.03), ("10/10", 0.01), ("10/10", 0.03)),
}
OTHERWISE: tuple[tuple[Refresh, float], ...] = (("10/10", 0.03),)


def steps_to_loss(name: str, model: str, refresh: Refresh, lr: float, seed: int, limit: int = 50) -> int | None:
    """Returns the steps at batch 256 until the mean of three losses is below the target; None if `limit` end above."""
    trainer, stream = build(name, model_of(model, seed), refresh, lr=lr), batches(model, 256, seed)
    losses: list[float] = []
    for step in range(1, limit + 1):
        try:
            losses.append(trainer.step(*next(stream)))
        except NonFiniteError:
            return None
        if len(losses) >= 3 and statistics.fmean(losses[-3:]) < TARGET_LOSS[model]:
            return step
    return None


def sampling_rows(models: Sequence[str], seeds: Sequence[int] = (0, 1, 2)) -> list[dict[str, Any]]:
    settings = [(model, *setting) for model in models for setting in SAMPLED.get(model, OTHERWISE)]
    return [
        {
            "model": model,
            "refresh": refresh,
            "lr": lr,
            "optimizer": name,
            "steps": [steps_to_loss(name, model, refresh, lr, seed) for seed in seeds],
        }
        for model, refresh, lr in settings
        for name in OURS
        if not why_not(name)
    ]


# --- tables -----------------------------------------------------------------------------------------------------------


def half_of_best(rows: Sequence[dict[str, Any]], model: str, refresh: Refresh) -> float | None:
    """Returns 1 + half the overhead of this run's best dense K-FAC at batch 256 on one rank, if one ran."""
    rivals = [row for row in _at(rows, model) if row["optimizer"] in DENSE and row["refresh"] == refresh]
    of_rivals = [row["ratio"] for row in rivals if row["ratio"] is not None]
    return 1 + (min(of_rivals) - 1) / 2 if of_rivals else None


def _at(rows: Sequence[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    return [row for row in rows if (row["model"], row["batch"], row["ranks"]) == (model, 256, 1)]


def target_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns ours beside its targets, a row for each model and refresh."""
    targets: list[dict[str, Any]] = []
    for (model, refresh), limit in TARGETS.items():
        ours = {
            row["optimizer"]: row["ratio"]
            for row in _at(rows, model)
            if row["optimizer"] in OURS and row["refresh"] == refresh and row["ratio"] is not None
        }
        if ours:
            best = half_of_best(rows, model, refresh)
            targets.append({"model": model, "refresh": refresh, "at_most": limit, "half_of_best": best, "ours": ours})
    return targets


def targets_table(targets: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the rows of `target_rows` in Markdown."""
    lines = [
        "| model | refresh | at most | half the overhead of this run's best dense K-FAC | ours |",
        "|---|---|---|---|---|",
    ]
    for row in targets:
        ours = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["ours"].items())
        best = "-" if row["half_of_best"] is None else f"{row['half_of_best']:.2f}"
        lines.append(f"| {row['model']} | {row['refresh']} | {row['at_most']} | {best} | {ours} |")
    return lines


def table(result: dict[str, Any]) -> str:
    """Returns the whole result in Markdown."""
    lines = ["# Time of one training step beside SGD's", "", (__doc__ or "").split("\n\n    ")[0], ""]
    lines += ["## Ours beside the targets", "", *targets_table(result["targets"]), ""] if result.get("targets") else []
    groups = dict.fromkeys((row["model"], row["batch"], row["ranks"]) for row in result["rows"])
    for model, batch, ranks in groups:
        rows = [row for row in result["rows"] if (row["model"], row["batch"], row["ranks"]) == (model, batch, ranks)]
        lines += [f"## {model}, batch {batch}, {ranks} rank{'s' * (ranks > 1)}: SGD {rows[0]['sgd_ms']:.1f} ms", ""]
        lines += ["| optimizer | refresh | times SGD | least to most | ms | refreshed per step | last loss |"]
        lines += ["|---|---|---|---|---|---|---|"]
        lines += [_line(row) for row in rows] + [""]
    if result.get("sampling"):
        lines += [
            "## Steps at batch 256 to the same loss, three seeds",
            "",
            "| model | refresh | lr | optimizer | steps |",
            "|---|---|---|---|---|",
        ]
        for row in result["sampling"]:
            steps = ", ".join("not reached" if s is None else str(s) for s in row["steps"])
            lines.append(f"| {row['model']} | {row['refresh']} | {row['lr']} | {row['optimizer']} | {steps} |")
        lines.append("")
    lines += [f"Left out: {name}: {reason}." for name, reason in result["left_out"].items()]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    if row["failure"]:
        return f"| {row['optimizer']} | {row['refresh']} | fails | | | | {row['failure']} |"
    least, most = row["spread"]
    share = "-" if row["refreshed_share"] is None else f"{row['refreshed_share']:.2f}"
    loss = "diverged" if row["loss"] is None else f"{row['loss']:.3f}"
    figures = f"{row['ratio']:.2f} | {least:.2f} to {most:.2f} | {row['ms']:.1f} | {share} | {loss}"
    return f"| {row['optimizer']} | {row['refresh']} | {figures} |"


def run(device: str, plans: Sequence[Plan], two_ranks: Sequence[Plan] = ()) -> dict[str, Any]:
    """Returns the result of all plans: rows, targets, and the optimizers left out with the reasons."""
    rows: list[dict[str, Any]] = []
    for plan in plans:
        print(f"{plan.model}, batch {plan.batch}", flush=True)
        rows += on_cuda(plan) if device == "cuda" else on_cpu(plan)
    for plan in two_ranks:
        print(f"{plan.model}, batch {plan.batch}, two ranks", flush=True)
        rows += on_two_ranks(plan)
    models = [] if device == "cuda" else list(dict.fromkeys(plan.model for plan in plans if plan.batch == 256))
    names = dict.fromkeys(name for plan in (*plans, *two_ranks) for name in plan.names)
    return {
        "rows": rows,
        "targets": target_rows(rows),
        "sampling": sampling_rows(models),
        "left_out": {name: reason for name in names if (reason := why_not(name))},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", nargs="+", help="default: all of the device")
    parser.add_argument("--batches", nargs="+", type=int, help="default: all of the device")
    parser.add_argument("--ranks", nargs="+", type=int, choices=[1, 2], default=[1, 2], help="default: 1 2; on a CPU")
    parser.add_argument("--hardware", default="cpu2", help="last word in the name of the result's folder")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: the step timing is skipped; run make gpu on a machine with one")
        return
    plans = GPU_PLANS if arguments.device == "cuda" else PLANS
    plans = tuple(plan for plan in plans if plan.model in (arguments.models or [plan.model]))
    plans = tuple(plan for plan in plans if plan.batch in (arguments.batches or [plan.batch]))
    pairs = [] if arguments.device == "cuda" or 2 not in arguments.ranks else [p for p in plans if p.batch == 256]
    two_ranks = [Plan(p.model, 256, blocks=4, steps=p.steps, settle=15, names=RANKS_NAMES) for p in pairs]
    result = run(arguments.device, plans if 1 in arguments.ranks else (), two_ranks)
    write(folder_for("step-overhead", arguments.hardware), result, table(result))
    print(table(result))


if __name__ == "__main__":
    main()
