"""How many bytes does a rank send per step, for which purpose, and how long do they take over a slow link?

Bytes are those of `StepStats`, averaged over ranks and steps: for a reduce-scatter or an exchange those that leave a
rank, for an all-reduce those that a ring sends. SGD sends one all-reduce of its gradients, counted the same way. Every
setting sees the same batches, so that losses compare. "loss" is the mean over the last tenth of the steps. "steps" is
the number of steps until the mean of a tenth is as low as that of refreshing in every step after three quarters of the
run. All ranks share one link in both directions: the loopback of a network namespace, limited by tc. That needs root.

    python -m benchmarks.comm_volume
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.models import batches, count_parameters, model_of
from benchmarks.ranks import on_ranks
from benchmarks.record import folder_for, write
from ngd_dist import NGD, NGDConfig
from ngd_dist.distributed.wire import Wire
from ngd_dist.inversion import solve
from ngd_dist.statistics.statistic import Key

CASE = ("model", "ranks", "batch", "steps")
KINDS = ("statistics", "gradients", "inverses", "directions", "reports", "control")
COMMON = {"lr": 0.01, "damping": 0.1, "momentum": 0.9}
EVERY_STEP: dict[str, Any] = {"staleness": {"kind": "fixed", "steps": 1}}
REFERENCE = "every step"
SETTINGS: dict[str, dict[str, Any]] = {
    REFERENCE: EVERY_STEP,
    "every step, bfloat16": EVERY_STEP | {"statistics_wire": "bfloat16"},
    "every tenth": {"staleness": {"kind": "fixed", "steps": 10}},
    "every tenth, bfloat16": {"staleness": {"kind": "fixed", "steps": 10}, "statistics_wire": "bfloat16"},
    "adaptive": {},
    "adaptive, EMA 0.9": {"ema_decay": 0.9},
    "adaptive, bfloat16": {"statistics_wire": "bfloat16"},
    "adaptive, float16": {"statistics_wire": "float16"},
    "adaptive, held by half": {"strategy": {"kind": "owner_sharded", "fraction": 0.5}},
    "adaptive, held by all": {"strategy": {"kind": "owner_sharded", "fraction": 1.0}},
    "adaptive, held by all in bfloat16": {
        "strategy": {"kind": "owner_sharded", "fraction": 1.0},
        "inverse_dtype": "bfloat16",
    },
    "adaptive, all_reduce": {"strategy": {"kind": "all_reduce"}},
}
HOLDERS = (REFERENCE, "adaptive", *(name for name in SETTINGS if "all" in name or "half" in name))
WIRES = (REFERENCE, "every step, bfloat16", "adaptive", "adaptive, float16", "adaptive, EMA 0.9")
# Model, ranks, batch, steps, settings. Growing intervals need many steps to show, the other settings few.
CASES = (
    ("mlp", 2, 128, 320, (REFERENCE, "every tenth", "every tenth, bfloat16", "adaptive", "adaptive, bfloat16")),
    ("resnet20", 2, 64, 30, WIRES),
    ("mlp", 4, 128, 30, HOLDERS),
)
OVER_LINK: dict[str, dict[str, Any] | None] = {
    "sgd": None,
    REFERENCE: EVERY_STEP,
    "every step, no overlap": EVERY_STEP | {"bucket_mb": 0.0},
    "every step, bfloat16": EVERY_STEP | {"statistics_wire": "bfloat16"},
    "adaptive": {},
}
MBIT, LINK_STEPS, LINK_BLOCKS = 200, 18, 2


def train(rank: int, world_size: int, model_name: str, batch: int, steps: int, settings: dict[str, Any]) -> Any:
    """Returns this rank's loss and bytes by kind of each step. Collective."""
    model = model_of(model_name)
    optimizer = NGD(model, NGDConfig.model_validate(COMMON | settings))
    stream = batches(model_name, batch // world_size, seed=rank)
    records = []
    for _ in range(steps):
        loss = one_step(model, optimizer, *next(stream))
        records.append({"loss": loss, "bytes": optimizer.stats.bytes_sent})
    return records


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def row(name: str, model: str, ranks: int, batch: int, steps: int, by_rank: Sequence[Any]) -> dict[str, Any]:
    """Returns the bytes per step by kind, those of statistics over the last half of the steps too, and the losses."""

    def mean_of(kind: str, first: int) -> float:
        return statistics.mean(step["bytes"].get(kind, 0) for records in by_rank for step in records[first:])

    losses = [statistics.mean(records[i]["loss"] for records in by_rank) for i in range(steps)]
    tenth = max(1, steps // 10)
    return {
        "setting": name, "model": model, "ranks": ranks, "batch": batch, "steps": steps,
        "bytes": {kind: mean_of(kind, 0) for kind in KINDS},
        "statistics_last_half": mean_of("statistics", steps // 2),
        "smoothed": [statistics.mean(losses[max(0, i + 1 - tenth) : i + 1]) for i in range(steps)],
    }  # fmt: skip


def measure(cases: Sequence[tuple[str, int, int, int, Sequence[str]]]) -> list[dict[str, Any]]:
    """Returns a row per case and setting, and one of SGD."""
    rows = []
    for model, ranks, batch, steps, names in cases:
        by_rank = on_ranks(ranks, _train_each, model, batch, steps, names)
        of_model = [row(name, model, ranks, batch, steps, [of[name] for of in by_rank]) for name in names]
        target = next(r for r in of_model if r["setting"] == REFERENCE)["smoothed"][steps * 3 // 4 - 1]
        for each in of_model:
            smoothed = each.pop("smoothed")
            each["loss"] = smoothed[-1]
            each["steps_to_target"] = next((i + 1 for i, loss in enumerate(smoothed) if loss <= target), None)
        rows += [sgd_row(model, ranks, batch, steps), *of_model]
        print(f"{model} on {ranks} ranks: done", flush=True)
    return rows


def _train_each(rank: int, world_size: int, model: str, batch: int, steps: int, names: Sequence[str]) -> dict[str, Any]:
    return {name: train(rank, world_size, model, batch, steps, SETTINGS[name]) for name in names}


def sgd_row(model: str, ranks: int, batch: int, steps: int) -> dict[str, Any]:
    """Returns the row of SGD: its gradients are counted, not sent."""
    nbytes = 2 * 4 * count_parameters(model_of(model)) * (ranks - 1) / ranks
    return {
        "setting": "SGD, counted", "model": model, "ranks": ranks, "batch": batch, "steps": steps,
        "bytes": dict.fromkeys(KINDS, 0.0) | {"gradients": nbytes},
        "statistics_last_half": 0.0, "loss": None, "steps_to_target": None,
    }  # fmt: skip


# --- what 16 bits cost in accuracy ------------------------------------------------------------------------------------


def wire_errors(model_name: str, batch: int) -> list[dict[str, Any]]:
    """Returns the largest relative error over layers of each statistic in 16 bits, and of the direction made from it.

    Factors and gradients are those of a model's first batch; the reference is float32 throughout.
    """
    model = model_of(model_name)
    # An average keeps whole factors, as several ranks do. Of one batch it is that of the batch.
    optimizer = NGD(model, NGDConfig.model_validate(COMMON | EVERY_STEP | {"ema_decay": 0.5}))
    one_step(model, optimizer, *next(batches(model_name, batch)))
    values = {key: s.value for key, s in optimizer._curvature.statistics.items() if s.value is not None}
    forms = {key: optimizer._curvature.statistics[key].spec.form for key in values}
    exact = _directions(optimizer, values)
    rows = []
    for dtype in (torch.bfloat16, torch.float16):
        wire = Wire({key: form.on_wire(torch.float32, dtype) for key, form in forms.items()})
        crossed = {
            key: forms[key].expand(wire.decode(key, wire.encode({key: forms[key].flatten(value)})))
            for key, value in values.items()
        }
        directions = _directions(optimizer, crossed)
        errors: dict[str, float] = {}
        for key, value in values.items():
            errors[key.statistic] = max(errors.get(key.statistic, 0.0), _error(crossed[key], value))
        errors["direction"] = max(_error(directions[name], exact[name]) for name in exact)
        rows.append({"model": model_name, "wire": str(dtype).removeprefix("torch."), "errors": errors})
    return rows


def _directions(optimizer: NGD, values: dict[Key, torch.Tensor]) -> dict[str, torch.Tensor]:
    directions = {}
    for layer in optimizer.layers:
        method = optimizer._covered[layer.name].method
        of_layer = {key.statistic: value for key, value in values.items() if key.layer == layer.name}
        given = (of_layer, frozenset(of_layer), float(COMMON["damping"]), None)
        problems = {Key(layer.name, name): problem for name, problem in method.problems(*given).items()}
        solved = {key.statistic: s for key, s in solve(problems, optimizer.config.inversion).items()}
        cache = method.refresh(*given, solved).cache
        gradients = [p.grad for p in layer.parameters if p.grad is not None]
        directions[layer.name] = layer.join(gradients) if cache is None else method.apply(cache, layer.join(gradients))
    return directions


def _error(rounded: torch.Tensor, exact: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(rounded - exact) / torch.linalg.vector_norm(exact))


# --- over a link ------------------------------------------------------------------------------------------------------


def over_link(model: str, ranks: int, batch: int, mbit: int) -> list[dict[str, Any]] | str:
    """Returns the seconds of a step of each setting over a link of that rate, or the reason why there are none."""
    with TemporaryDirectory() as folder:
        out = Path(folder, "rows.json")
        link = f"ip link set lo up && tc qdisc add dev lo root tbf rate {mbit}mbit burst 256kb latency 1s"
        again = f"{sys.executable} -m benchmarks.comm_volume --inside-link {out} {model} {ranks} {batch}"
        ended = subprocess.run(
            ["unshare", "-n", "sh", "-c", f"{link} && GLOO_SOCKET_IFNAME=lo exec {again}"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if ended.returncode:
            return (ended.stderr.strip().splitlines() or ["no reason given"])[-1]
        rows: list[dict[str, Any]] = json.loads(out.read_text())
    return rows


def inside_link(model: str, ranks: int, batch: int) -> list[dict[str, Any]]:
    """Returns the median, the least and the most of the mean seconds per step, over interleaved blocks."""
    by_rank = on_ranks(ranks, _time_each, model, batch)
    blocks = {name: [max(of[name][i] for of in by_rank) for i in range(LINK_BLOCKS)] for name in OVER_LINK}
    return [
        {"setting": name, "seconds": statistics.median(seconds), "spread": [min(seconds), max(seconds)]}
        for name, seconds in blocks.items()
    ]


def _time_each(rank: int, world_size: int, model_name: str, batch: int) -> dict[str, list[float]]:
    seconds_of: dict[str, list[float]] = {name: [] for name in OVER_LINK}
    for _ in range(LINK_BLOCKS):
        for name, settings in OVER_LINK.items():
            seconds_of[name].append(_time_of_a_step(rank, world_size, model_name, batch, settings))
    return seconds_of


def _time_of_a_step(rank: int, world_size: int, model_name: str, batch: int, settings: dict[str, Any] | None) -> float:
    """Returns the mean over all but the first third of the steps."""
    model = model_of(model_name)
    wrapped = DistributedDataParallel(model) if settings is None else model
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(model.parameters(), COMMON["lr"], momentum=COMMON["momentum"])
        if settings is None
        else NGD(model, NGDConfig.model_validate(COMMON | settings))
    )
    stream = batches(model_name, batch // world_size, seed=rank)
    begin = 0.0
    for step in range(LINK_STEPS):
        if step == LINK_STEPS // 3:
            begin = time.perf_counter()
        one_step(wrapped, optimizer, *next(stream))
    return (time.perf_counter() - begin) / (LINK_STEPS - LINK_STEPS // 3)


# --- the result -------------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """Returns the result in Markdown, in thousands of bytes."""
    lines = ["# Bytes between ranks", "", (__doc__ or "").split("\n\n    ")[0], ""]
    lines += ["Thousands of bytes that a rank sends in a step.", ""]
    cases = dict.fromkeys(tuple(row[key] for key in CASE) for row in result["rows"])
    for case in cases:
        rows = [row for row in result["rows"] if tuple(row[key] for key in CASE) == case]
        reference = next(row for row in rows if row["setting"] == REFERENCE)
        model, ranks, batch, steps = case
        lines += [f"## {model}, {ranks} ranks, batch {batch}, {steps} steps", ""]
        shown = [kind for kind in KINDS if any(row["bytes"][kind] for row in rows)]
        head = ["setting", *shown, "total", "statistics, of every step's", "in the last half", "loss", "steps"]
        lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        whole, last = reference["bytes"]["statistics"], reference["statistics_last_half"]
        for row in rows:
            nbytes = [row["bytes"][kind] for kind in shown]
            cells = [row["setting"], *(f"{n / 1e3:.1f}" for n in [*nbytes, sum(nbytes)])]
            if row["loss"] is None:
                cells += ["", "", "", ""]
            else:
                cells += [f"{row['bytes']['statistics'] / whole:.3f}", f"{row['statistics_last_half'] / last:.3f}"]
                cells += [f"{row['loss']:.3f}", str(row["steps_to_target"] or "not reached")]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines += ["## What a wire in 16 bits costs in accuracy", ""]
    lines += [
        "Largest relative error over layers of each statistic (F: of units), and of the direction made of them.",
        "",
    ]
    names = list(dict.fromkeys(name for row in result["wire"] for name in row["errors"]))
    lines += [f"| model, wire | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in result["wire"]:
        errors = (f"{row['errors'][name]:.1e}" if name in row["errors"] else "" for name in names)
        lines.append(f"| {row['model']}, {row['wire']} | {' | '.join(errors)} |")
    return "\n".join([*lines, "", *_link_table(result["link"]), *(["", result["note"]] if result["note"] else [])])


def _link_table(link: dict[str, Any]) -> list[str]:
    lines = [f"## {link['model']}, {link['ranks']} ranks, over {link['mbit']} Mbit/s", ""]
    if isinstance(link["rows"], str):
        return [*lines, f"Not measured: {link['rows']}."]
    lines += [f"Of steps {LINK_STEPS // 3 + 1} to {LINK_STEPS}, where an adaptive schedule still refreshes often.", ""]
    lines += ["| setting | ms per step | least to most of the blocks | times SGD |", "|---|---|---|---|"]
    sgd = next(row["seconds"] for row in link["rows"] if row["setting"] == "sgd")
    for row in link["rows"]:
        least, most = (1e3 * seconds for seconds in row["spread"])
        ms = 1e3 * row["seconds"]
        lines.append(f"| {row['setting']} | {ms:.0f} | {least:.0f} to {most:.0f} | {row['seconds'] / sgd:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="cpu2", help="last word in the name of the result's folder")
    parser.add_argument("--note", default="", help="a sentence on how it was measured, which the result quotes")
    parser.add_argument("--inside-link", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside_link:
        out, model, ranks, batch = arguments.inside_link
        Path(out).write_text(json.dumps(inside_link(model, int(ranks), int(batch))))
        return
    rows = measure(CASES)
    wire = [row for model in ("mlp", "resnet20") for row in wire_errors(model, 128)]
    link = {"model": "mlp", "ranks": 2, "batch": 128, "mbit": MBIT, "rows": over_link("mlp", 2, 128, MBIT)}
    result = {"common": COMMON, "settings": SETTINGS, "rows": rows, "wire": wire, "link": link, "note": arguments.note}
    write(folder_for("comm-volume", arguments.hardware), result, table(result))
    print(table(result))


if __name__ == "__main__":
    main()
