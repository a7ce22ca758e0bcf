"""What do the natural gradient's steps cost under each engine, beside SGD under the same one?

Two gloo ranks with one thread each train the MLP 784-512-512-512-10 at batch 256, refreshing every tenth step, layers
in turn. Blocks of ten steps of NGD alternate with blocks of SGD with momentum under the same engine; the clock is a
rank's CPU time, without the drawing of batches, and the busier rank counts. "KB" are those that leave a rank in a step:
what the optimizer counts itself, and what an engine sends by its formula in a ring. The second table has all tensors
that a rank can reach from its engine and optimizer between two steps, by kind; "engine" are buffers and gradients that
an engine keeps. ZeRO 3 has a bucket of 2 GB, DeepSpeed's default, whatever the model.

    python -m benchmarks.engines  # some five minutes
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.held_bytes import held_bytes
from benchmarks.models import batches, model_of
from benchmarks.ranks import on_ranks
from benchmarks.record import folder_for, write
from ngd_dist import NGD, NGDConfig
from ngd_dist.config import FixedInterval
from ngd_dist.distributed.comm import Communicator
from ngd_workers.contract.spec import JobSpec
from ngd_workers.train.engines import Engine, engine_of

# Part of a tensor's path: its kind; the first one that fits.
KINDS = {
    "param_coordinat": "engine",
    "momentum_buffer": "momentum",
    "_curvature.statistics": "statistics",
    "_curvature.caches": "inverses",
    "param": "weights",
}
CYCLE, BATCH = 10, 256  # steps; samples of all ranks
ENGINES: dict[str, dict[str, Any]] = {
    "bare": {"kind": "bare"},
    "ddp": {"kind": "ddp"},
    "fsdp": {"kind": "fsdp"},
} | {f"zero {stage}": {"kind": "deepspeed", "stage": stage} for stage in range(4)}


def driven(name: str, optimizer: str, world_size: int) -> Engine:
    """Returns the model under an engine. Collective."""
    spec = JobSpec.model_validate(
        {
            "name": "engines",
            "model": {"kind": "mlp"},
            "data": {"kind": "digits"},
            "optimizer": {"kind": optimizer},
            "engine": ENGINES[name],
            "schedule": {"steps": 1},
            "batch": {"global_size": BATCH},
            "resources": {"workers": world_size},
        }
    )
    engine = engine_of(spec)(model_of("mlp"), spec, Communicator(), torch.device("cpu"))
    engine.wrap(natural if optimizer == "ngd" else plain)
    return engine


def natural(model: nn.Module) -> torch.optim.Optimizer:
    return NGD(model, NGDConfig(lr=1e-3, damping=0.1, staleness=FixedInterval(steps=CYCLE)))


def plain(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def block(engine: Engine, stream: Iterator[tuple[Tensor, Tensor]]) -> float:
    """Returns the mean seconds of a step. Collective."""
    drawn = [next(stream) for _ in range(CYCLE)]
    start = time.process_time()
    for x, y in drawn:
        with engine.accumulating(is_last=True):
            engine.backward(F.cross_entropy(engine.forward(x), y))
        engine.update(1e-3)
    return (time.process_time() - start) / CYCLE


def rank_rows(rank: int, world_size: int, blocks: int) -> list[dict[str, Any]]:
    os.environ["LOCAL_RANK"] = str(rank)
    rows = []
    for name in ENGINES:
        with_sgd = name != "bare"  # nobody averages for SGD there: DDP does
        ours, theirs = driven(name, "ngd", world_size), driven(name if with_sgd else "ddp", "sgd", world_size)
        stream = batches("mlp", BATCH // world_size, seed=rank)
        block(ours, stream)
        block(theirs, stream)
        sent: dict[str, int] = {}
        before, ratios, seconds = block(theirs, stream), [], []
        for _ in range(blocks):
            spent, after = block(ours, stream), block(theirs, stream)
            ratios.append(2 * spent / (before + after))
            seconds.append((spent, after))
            before = after
        optimizer = ours.optimizer
        assert isinstance(optimizer, NGD)
        for _ in range(CYCLE):  # the bytes of a whole cycle
            x, y = next(stream)
            with ours.accumulating(is_last=True):
                ours.backward(F.cross_entropy(ours.forward(x), y))
            ours.update(1e-3)
            sent = {k: sent.get(k, 0) + v for k, v in optimizer.stats.bytes_sent.items()} | {
                k: v for k, v in sent.items() if k not in optimizer.stats.bytes_sent
            }
        rows.append(
            {
                "engine": name,
                "ratio": statistics.median(ratios),
                "spread": [min(ratios), max(ratios)],
                "ms": 1e3 * statistics.median(s for s, _ in seconds),
                "sgd_ms": 1e3 * statistics.median(s for _, s in seconds),
                "optimizer_bytes": {kind: count // CYCLE for kind, count in sent.items()},
                "engine_bytes": ours.gradient_bytes,
                "held": held_bytes([ours], KINDS),
                "sgd_held": held_bytes([theirs], KINDS),
            }
        )
        del ours, theirs
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["# NGD's step under each engine, beside SGD's", "", (__doc__ or "").split("\n\n    ")[0], ""]
    lines += ["| engine | times SGD | least to most | ms | SGD, ms | KB a step, by the optimizer | by the engine |"]
    lines.append("|---" * 7 + "|")
    for row in rows:
        kinds = ", ".join(f"{kind} {count / 1e3:.0f}" for kind, count in row["optimizer_bytes"].items() if count >= 500)
        by_engine = sum(row["engine_bytes"].values()) / 1e3
        cells = [row["engine"], f"{row['ratio']:.2f}", "{:.2f} to {:.2f}".format(*row["spread"]), f"{row['ms']:.1f}"]
        cells += [f"{row['sgd_ms']:.1f}", kinds or "0", f"{by_engine:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Under bare, SGD's row is DDP's: a bare model needs an optimizer that averages.", ""]
    kinds = ["weights", "momentum", "statistics", "inverses", "engine"]
    lines += ["| engine | optimizer | " + " | ".join(f"{kind}, MB" for kind in kinds) + " | all |"]
    lines.append("|---" * (3 + len(kinds)) + "|")
    for row in rows:
        for optimizer, held in (("NGD", row["held"]), ("SGD", row["sgd_held"])):
            of_kinds = held | {"engine": held.get("engine", 0) + held.get("other", 0)}
            cells = [row["engine"], optimizer, *(f"{of_kinds.get(kind, 0) / 1e6:.1f}" for kind in kinds)]
            lines.append(f"| {' | '.join(cells)} | {sum(held.values()) / 1e6:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--hardware", help="last word in the name of the result's folder; none: nothing is written")
    arguments = parser.parse_args()
    by_rank = on_ranks(2, rank_rows, arguments.blocks)
    rows = [max(of_engine, key=lambda row: row["ratio"]) for of_engine in zip(*by_rank, strict=True)]
    if arguments.hardware:
        write(folder_for("engines", arguments.hardware), {"rows": rows}, table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
