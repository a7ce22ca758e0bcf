"""How far are the planner's predictions from measured steps, after one short run on this machine?

One run of one process sets the rates: steps with and without a refresh, at two batches. Predicted are other batches and
intervals, and two ranks. Times are CPU time of one process with one thread, per step: the mean over whole intervals,
the median of some such means, the settings in turn. On two ranks they are those of the busier rank, and the rate of the
link is that of messages between these two processes, in CPU time as well. Below: SP-NGD's published steps.

    python -m benchmarks.planner
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.models import batches, model_of
from benchmarks.ranks import on_ranks
from benchmarks.record import folder_for, write
from ngd_dist import NGD, NGDConfig
from ngd_dist.config import FixedInterval
from ngd_dist.cost.calibration import Measured, StepSeconds, calibrated
from ngd_dist.cost.card import ModelCard
from ngd_dist.cost.cluster import PRESETS, Cluster, Link
from ngd_dist.cost.seconds import seconds
from ngd_dist.cost.setup import Setup
from ngd_dist.distributed.comm import Communicator
from ngd_dist.model_card import card_of
from ngd_dist.telemetry import Stopwatch
from ngd_workers.launch.measuring import BLOCK, COUNTED

COMMON: dict[str, Any] = {"lr": 1e-3, "damping": 0.1, "ema_decay": 0.5}
CALIBRATED = {"mlp": (128, 512), "resnet20": (32, 128)}
# Batch of a rank, and interval.
CASES = {
    "mlp": ((128, 1), (128, 5), (256, 10), (512, 1), (512, 5)),
    "resnet20": ((64, 1), (64, 5), (128, 10), (32, 1), (32, 5)),
}
ROUNDS, CYCLE = 2, 10  # of steps: a multiple of all intervals
MESSAGES = (2**10, 2**22)  # bytes
# Batch, ranks, share of statistics that were refreshed, seconds of a step: [OT20] as docs/guides/planning.md quotes it.
PUBLISHED = (
    (4096, 128, 0.236, 0.178),
    (8192, 256, 0.151, 0.187),
    (16384, 512, 0.054, 0.186),
    (32768, 1024, 0.078, 0.1875),
)


class Timed:
    """A model under one setting, whose steps are timed."""

    def __init__(self, name: str, config: NGDConfig, batch: int, rank: int = 0) -> None:
        self.model = model_of(name)
        self.optimizer = NGD(self.model, config)
        self.stream = batches(name, batch, seed=rank)

    def step(self) -> float:
        """Returns the CPU seconds of a step, without the making of its batch."""
        x, y = next(self.stream)
        start = time.process_time()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        return time.process_time() - start


class Calibration:
    """A run of one process, as `ngd plan --measure` makes it, in cycles that alternate with what is predicted."""

    def __init__(self, name: str, card: ModelCard) -> None:
        self.card = card
        self.config = NGDConfig.model_validate(COMMON | {"staleness": FixedInterval(steps=BLOCK), "stagger": 0.0})
        self.timed = Timed(name, self.config, 1)
        in_turn = NGDConfig.model_validate(COMMON | {"staleness": FixedInterval(steps=BLOCK)})
        self.in_turn, self.blocks = Timed(name, in_turn, min(CALIBRATED[name])), list[float]()
        self.streams = {batch: batches(name, batch) for batch in CALIBRATED[name]}
        self.taken: dict[tuple[int, bool], list[float]] = {}
        self.phases: dict[tuple[int, bool], list[dict[str, float]]] = {}

    def cycle(self, *, counts: bool) -> None:
        """Takes a step with a refresh and some without one, for each batch; see `measuring`."""
        for batch, stream in self.streams.items():
            self.timed.stream = stream
            for index in range(2 * BLOCK):
                cpu = self.timed.step()
                if counts and index in COUNTED:
                    kind = (batch, index == BLOCK)
                    self.taken.setdefault(kind, []).append(cpu)
                    self.phases.setdefault(kind, []).append(dict(self.timed.optimizer.stats.seconds))
        block = statistics.mean(self.in_turn.step() for _ in range(BLOCK))
        if counts:
            self.blocks.append(block)

    def result(self) -> Measured:
        steps = [
            StepSeconds(
                samples=batch,
                refreshes=refreshes,
                seconds=statistics.median(of),
                phases=_median(self.phases[batch, refreshes]),
            )
            for (batch, refreshes), of in self.taken.items()
        ]
        in_turn = statistics.median(self.blocks)
        return Measured(device="cpu", card=self.card, optimizer=self.config, in_turn_s=in_turn, steps=tuple(steps))


def _median(of_steps: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(phases.get(name, 0.0) for phases in of_steps) for name in of_steps[0]}


def steps(rank: int, world_size: int, name: str, rounds: int, calibration: Calibration | None = None) -> list[float]:
    """Returns the CPU seconds of a step of each case, on this rank."""
    timed = [Timed(name, config_of(interval), batch, rank) for batch, interval in CASES[name]]
    means: list[list[float]] = [[] for _ in timed]
    for index in range(1 + rounds):
        for one, of_case in zip(timed, means, strict=True):
            mean = statistics.mean(one.step() for _ in range(CYCLE))
            if index:
                of_case.append(mean)
            if calibration is not None:
                calibration.cycle(counts=index > 0)
    return [statistics.median(of_case) for of_case in means]


def config_of(interval: int) -> NGDConfig:
    return NGDConfig.model_validate(COMMON | {"staleness": {"kind": "fixed", "steps": interval}})


def messages(rank: int, world_size: int) -> list[float]:
    """Returns the CPU seconds of sending and receiving a message of each size."""
    comm, taken = Communicator(), []
    for nbytes in MESSAGES:
        sent, of_size = [torch.zeros(nbytes, dtype=torch.uint8)] * world_size, []
        for _ in range(30):
            start = time.process_time()
            comm.begin_exchange("timed", sent, [nbytes] * world_size, kind="control").wait()
            of_size.append(time.process_time() - start)
        taken.append(statistics.median(of_size))
    return taken


def link(by_rank: Sequence[Sequence[float]]) -> Link:
    few, many = (max(taken) for taken in zip(*by_rank, strict=True))
    rate = (MESSAGES[1] - MESSAGES[0]) / (many - few)
    return Link(latency_us=few * 1e6, gb_s=rate / 1e9)


def run(names: Sequence[str], rounds: int = ROUNDS) -> dict[str, Any]:
    Stopwatch.clock = time.process_time
    between = link(on_ranks(2, messages))
    rows: list[dict[str, Any]] = []
    for name in names:
        card = card_of(model_of(name), [next(batches(name, 2))[0]])
        calibration = Calibration(name, card)
        for ranks in (1, 2):
            by_rank = [steps(0, 1, name, rounds, calibration)] if ranks == 1 else on_ranks(2, steps, name, rounds)
            device = calibrated(PRESETS["cpu"], calibration.result())
            cluster = Cluster(devices_per_node=ranks, device=device, inside=between)
            for (batch, interval), taken in zip(CASES[name], map(max, zip(*by_rank, strict=True)), strict=True):
                parts = seconds(Setup(card, config_of(interval), ranks, batch), cluster, hides=False)
                predicted = sum(parts.values())
                rows.append(
                    {
                        "model": name, "ranks": ranks, "batch": batch, "interval": interval, "measured": taken,
                        "predicted": predicted, "error": predicted / taken - 1, "parts": parts,
                    }
                )  # fmt: skip
            print(f"{name} on {ranks} rank{'s' * (ranks > 1)}: done", flush=True)
    return {"rows": rows, "link": between.model_dump(), "published": published()}


def published() -> list[dict[str, Any]]:
    """Returns the steps that [OT20] reports beside those that are predicted for its cluster, uncalibrated."""
    from torchvision.models import resnet50

    with torch.device("meta"):
        model = resnet50()
    card = card_of(model, [torch.zeros(2, 3, 224, 224)])
    mean = statistics.mean(share for _, _, share, _ in PUBLISHED)
    rows = []
    for batch, ranks, share, taken in PUBLISHED:
        predictions = [abci_step(card, ranks, batch // ranks, of_statistics) for of_statistics in (share, mean)]
        rows.append(
            {"batch": batch, "ranks": ranks, "share": share, "published": taken, "predicted": predictions[0],
             "at_mean_share": predictions[1]}
        )  # fmt: skip
    return rows


def abci_step(card: ModelCard, ranks: int, samples: int, share: float) -> float:
    return sum(seconds(abci(card, ranks, samples, share), abci_cluster(ranks)).values())


def abci(card: ModelCard, ranks: int, samples: int, share: float) -> Setup:
    config = NGDConfig(statistics_wire="float16")
    return Setup(card, config, ranks, samples, refresh_share=share)


def abci_cluster(ranks: int) -> Cluster:
    """Returns nodes of four V100 with two EDR InfiniBand links; statistics are made on tensor cores, at 0.3 of them."""
    device = {"preset": "v100", "statistics_efficiency": 0.3 * 125 / 15.7}
    return Cluster.model_validate(
        {"nodes": ranks // 4, "devices_per_node": 4, "device": device, "inside": {"gb_s": 40}, "between": {"gb_s": 25}}
    )


def table(result: dict[str, Any]) -> str:
    lines = ["# Predicted and measured steps", "", (__doc__ or "").split("\n\n    ")[0], ""]
    lines += ["| model | ranks | batch of a rank | interval | measured ms | predicted ms | error |", "|---" * 7 + "|"]
    for row in result["rows"]:
        lines.append(
            f"| {row['model']} | {row['ranks']} | {row['batch']} | {row['interval']} | {1e3 * row['measured']:.1f} | "
            f"{1e3 * row['predicted']:.1f} | {row['error']:+.1%} |"
        )
    worst = max(result["rows"], key=lambda row: abs(row["error"]))
    mean = statistics.mean(abs(row["error"]) for row in result["rows"])
    lines += ["", f"Mean error {mean:.1%}, largest {worst['error']:+.1%} ({worst['model']}, {worst['ranks']} ranks)."]
    lines += ["", "## SP-NGD's ResNet-50 on V100, seconds of a step", ""]
    lines += [
        "| batch | GPUs | share refreshed | published | predicted | error | predicted at the mean share | error |"
    ]
    lines += ["|---" * 8 + "|"]
    for row in result["published"]:
        errors = [f"{row[name] / row['published'] - 1:+.0%}" for name in ("predicted", "at_mean_share")]
        lines.append(
            f"| {row['batch']:,} | {row['ranks']:,} | {row['share']:.3f} | {row['published']:.3f} | "
            f"{row['predicted']:.3f} | {errors[0]} | {row['at_mean_share']:.3f} | {errors[1]} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="cpu2", help="last word in the name of the result's folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = run(list(CASES))
    write(folder_for("planner", arguments.hardware), result, table(result))
    print(table(result))


if __name__ == "__main__":
    main()
