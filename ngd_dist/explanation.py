"""The table of `NGD.explain`: the method, cost and ranks of each layer, and the parameters of the fallback."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from ngd_dist.config import AdamWFallback, NGDConfig
from ngd_dist.covered import CoveredLayer, CoveredLayers
from ngd_dist.distributed import Sync
from ngd_dist.engines import Engine, class_of
from ngd_dist.factors.form import Form
from ngd_dist.step.fallback import lr_ratio

__all__ = ["explain"]

HEADER = ("layer", "kind", "gradient", "statistics", "rank", "refresh", "apply", "memory")
UNITS = ("", "K", "M", "G", "T")


def explain(
    config: NGDConfig,
    layers: CoveredLayers,
    engine: Engine,
    sync: Sync,
    plain_parameters: Mapping[str, str],
    activations: Mapping[str, str | None],
    groups: Sequence[Mapping[str, Any]],
    frozen: Mapping[str, str],
    *,
    updates_weights: bool = True,
) -> str:
    """Returns a table with a line per layer, the sums, and the reason why each other parameter is not among them.

    `groups`: the optimizer's param groups as they are now. `frozen`: why parameters of the model are not updated.

    gradient: [blocks x] outputs x inputs, a bias being the last input. refresh and apply: floating-point operations,
    once per refresh and in every step. memory: bytes of statistics and cache on a rank that holds the layer. Tensors
    that grow with the samples of a rank, N, count as those of one sample.
    `activations`: by layer that has run, the activation that reads its output, if the method asks for it.
    """
    rows = [_row(covered, sync, activations) for covered in layers.values()]
    flops = [(covered.method.refresh_flops(), covered.method.apply_flops()) for covered in layers.values()]
    total = sum(_bytes(covered) for covered in layers.values())
    sums = ("all", "", "", "", "", *(_scaled(sum(column)) for column in zip(*flops, strict=True)), _scaled(total, 1024))
    lines = [_head(config, engine, sync), "", *_table([HEADER, *rows, sums] if rows else [HEADER])]
    for head, reasons in (
        (
            f"left to the fallback, {_fallback(config, groups)}:" if updates_weights else "not preconditioned:",
            plain_parameters,
        ),
        ("not updated:", frozen),
    ):
        if reasons:
            lines += ["", head, *_table([(f"  {name}", reason) for name, reason in reasons.items()])]
    return "\n".join(lines)


def _fallback(config: NGDConfig, groups: Sequence[Mapping[str, Any]]) -> str:
    """Returns the fallback and the rates at which it runs now, group by group."""
    adamw = config.uncovered if isinstance(config.uncovered, AdamWFallback) else None
    rates = [group["lr"] if adamw is None else adamw.lr * lr_ratio(group) for group in groups]
    return f"{config.uncovered.kind} at lr {', '.join(f'{rate:.3g}' for rate in dict.fromkeys(rates))}"


def _head(config: NGDConfig, engine: Engine, sync: Sync) -> str:
    ranks = sync.comm.world_size
    where = "in one process" if ranks == 1 else f"on {ranks} ranks; gradients are averaged by {engine.averager}"
    kind = sync.kind
    return f"{config.preconditioner.kind}, {config.fisher.kind} Fisher, {config.staleness.kind} refresh, {kind} {where}"


def _row(covered: CoveredLayer, sync: Sync, activations: Mapping[str, str | None]) -> tuple[str, ...]:
    layer, preconditioner = covered.layer, covered.method
    blocks, outputs, inputs = layer.shape.gradient
    read_by = f", read by {activations[layer.name]}" if layer.name in activations else ""
    statistics = ", ".join(f"{spec.name} {_size(_sizes(spec.form))}" for spec in preconditioner.statistics)
    return (
        layer.name or "(model)",
        f"{class_of(layer.module).__name__}, {type(preconditioner).__name__}{read_by}",
        _size((blocks, outputs, inputs)),
        statistics,
        _ranks(layer.name, sync),
        _scaled(preconditioner.refresh_flops()),
        _scaled(preconditioner.apply_flops()),
        _scaled(_bytes(covered), 1024),
    )


def _ranks(name: str, sync: Sync) -> str:
    """Returns the ranks that refresh the layer's preconditioner, and the others that apply it."""
    roles = sync.placement.roles[name]
    if sync.is_replicated(name):
        return "all"
    others = ", ".join(map(str, sorted(roles.holders[1:])))
    return f"{roles.owner} for {others}" if others else str(roles.owner)


def _bytes(covered: CoveredLayer) -> int:
    """Returns the bytes of statistics and cache on a rank that holds the layer and reports on it.

    A statistic is held whole, and its value before the newest as it travels (packed, if symmetric).
    """
    kept = sum(prod(spec.shape) + spec.form.numbers for spec in covered.method.statistics)
    cached = sum(prod(shape) for shape in covered.method.cache_shapes.values())
    return (kept + cached) * covered.layer.dtype.itemsize


def _sizes(form: Form) -> list[int | str]:
    """Returns the lengths of the dimensions, N for those that grow with the samples."""
    return ["N" if dim in form.sample_dims else length for dim, length in enumerate(form.shape)]


def _size(shape: Sequence[int | str]) -> str:
    """Returns 3x3 for (1, 3, 3) and 2x3x3 for (2, 3, 3): one block is the rule."""
    lengths = shape[1:] if len(shape) > 1 and shape[0] == 1 else shape
    return "x".join(map(str, lengths))


def _scaled(number: float, base: int = 1000) -> str:
    """Returns three significant digits and a unit."""
    power = 0
    while number >= base and power < len(UNITS) - 1:
        number /= base
        power += 1
    suffix = f"{UNITS[power]}{'i' if base == 1024 and power else ''}{'B' if base == 1024 else ''}"
    return f"{number:.3g} {suffix}".strip()


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
