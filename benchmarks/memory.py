"""How many bytes does training hold on a rank, and for which purpose?

Tensors are counted at the fullest moment that all optimizers share: between backward and the step, after all state has
been made. The count has the model's tensors and all that are reachable from the optimizer, each storage once. It does
not have activations, temporaries inside a step and the buckets of DDP. "after" counts the tensors between two steps.

    python -m benchmarks.memory
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.models import batches, model_of
from benchmarks.peers import PEERS, Training, build, refreshes, why_not
from benchmarks.ranks import on_ranks
from benchmarks.record import folder_for, write

KINDS = ("weights", "gradients", "momentum", "statistics", "inverses", "kept rows", "buffers", "other")
MODELS = ("mlp", "resnet20")
ON_RANKS = ("sgd", "ngd", "ngd rows 128", "kfac-pytorch eigen", "kfac-pytorch inverse")
STEPS = 3  # in the third step an optimizer may hold the statistics of two earlier ones


def held(trainer: Training, model: nn.Module) -> dict[str, int]:
    """Returns bytes by kind of the model and of its optimizer."""
    counts = dict.fromkeys(KINDS, 0) | trainer.state_bytes()
    counts["weights"] = sum(p.nbytes for p in model.parameters())
    counts["gradients"] = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    counts["buffers"] += sum(b.nbytes for b in model.buffers())
    return counts


def row(name: str, model_name: str, batch: int, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """Returns the bytes that one optimizer holds on this rank. Collective on several ranks; ours needs no DDP."""
    bare = model_of(model_name)
    is_wrapped = world_size > 1 and not name.startswith("ngd")
    model = DistributedDataParallel(bare) if is_wrapped else bare
    trainer: Any = build(name, model, "adaptive" if "adaptive" in refreshes(name) else "1/1")
    step, fullest = trainer.update, {}

    def update(x: Tensor, y: Tensor) -> None:
        fullest.update(held(trainer, bare))
        step(x, y)

    trainer.update = update
    stream = batches(model_name, batch // world_size, seed=rank)
    for _ in range(STEPS):
        trainer.run(*next(stream))
    trainer.update = step  # otherwise the count would reach this function's tensors
    after = sum(held(trainer, bare).values())
    return {
        "model": model_name, "optimizer": name, "ranks": world_size, "rank": rank,
        "bytes": fullest, "total": sum(fullest.values()), "after": after,
    }  # fmt: skip


def _rank_rows(rank: int, world_size: int, names: Sequence[str], model: str, batch: int) -> list[dict[str, Any]]:
    return [row(name, model, batch, rank, world_size) for name in names]


def measure(models: Sequence[str], names: Sequence[str], batch: int, world_size: int) -> list[dict[str, Any]]:
    """Returns a row per model, optimizer and rank, for one process and for `world_size`."""
    here = [name for name in names if not why_not(name)]
    on_several = [name for name in ON_RANKS if name in here]
    rows = [row(name, model, batch) for model in models for name in here]
    if world_size > 1:
        for model in models:
            by_rank = on_ranks(world_size, _rank_rows, on_several, model, batch)
            rows += [row for row_by_rank in zip(*by_rank, strict=True) for row in row_by_rank]
    return rows


def table(result: dict[str, Any]) -> str:
    """Returns the result in Markdown, in thousands of bytes."""
    lines = ["# Bytes that training holds", "", (__doc__ or "").split("\n\n    ")[0], "", "Thousands of bytes.", ""]
    for model, ranks in dict.fromkeys((row["model"], row["ranks"]) for row in result["rows"]):
        lines += [f"## {model}, {ranks} rank{'s' * (ranks > 1)}", ""]
        lines += [f"| optimizer | rank | {' | '.join(KINDS)} | total | after |", "|---" * (len(KINDS) + 4) + "|"]
        for row in (row for row in result["rows"] if (row["model"], row["ranks"]) == (model, ranks)):
            counts = [row["bytes"][kind] for kind in KINDS] + [row["total"], row["after"]]
            figures = " | ".join(f"{count / 1e3:.0f}" for count in counts)
            lines.append(f"| {row['optimizer']} | {row['rank']} | {figures} |")
        lines.append("")
    lines += [f"Left out: {name}: {reason}." for name, reason in result["left_out"].items()]
    return "\n".join(lines)


def run(models: Sequence[str], names: Sequence[str], batch: int = 256, world_size: int = 2) -> dict[str, Any]:
    return {
        "rows": measure(models, names, batch, world_size),
        "batch": batch,
        "left_out": {name: reason for name in names if (reason := why_not(name))},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="cpu2", help="last word in the name of the result's folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = run(MODELS, list(PEERS))
    write(folder_for("memory", arguments.hardware), result, table(result))
    print(table(result))


if __name__ == "__main__":
    main()
