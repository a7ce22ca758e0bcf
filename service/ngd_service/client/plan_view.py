"""A plan in words and tables, of characters of one width."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from ngd_dist.cost.plan import Plan, Prediction
from ngd_service.client.plan_chart import text_chart

__all__ = ["plan_bytes", "plan_seconds", "plan_text"]

SHOWN_RANKS = (1, 8, 64, 256, 1024)


def plan_text(plan: Plan, name: str) -> str:
    """Returns the plan: a step, the job, other choices, the scaling, and what was assumed."""
    return "\n".join(_lines(plan, name))


def plan_bytes(number: float) -> str:
    """Returns bytes to three digits, as plans have them."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"


def plan_seconds(number: float) -> str:
    """Returns a time to three digits, as plans have it."""
    if number < 1:
        return f"{number * 1e3:.3g} ms"
    if number < 120:
        return f"{number:.3g} s"
    return f"{number / 60:.3g} min" if number < 7200 else f"{number / 3600:.3g} h"


def _lines(plan: Plan, name: str) -> Iterator[str]:
    step = plan.step
    movement = "" if step.strategy == "none" or step.ranks == 1 else f", {step.strategy}"
    yield (
        f"{name}: {plan.parameters:,} weights, {plan.layers} layers; {step.ranks} x {plan.device or 'device'}, "
        f"{plan.samples_per_rank} samples each; engine {step.engine}{movement}"
    )
    for warning in plan.warnings:
        yield f"WARNING: {warning}"
    yield ""
    fits = "fits" if step.fits else "does NOT fit"
    yield f"memory of the fullest rank   {plan_bytes(step.memory)} of {plan.memory_gib:g} GiB: {fits}"
    yield from _parts(step.memory_bytes, plan_bytes)
    if step.bytes_sent:
        sent, busiest = sum(step.bytes_sent.values()), step.busiest_bytes
        yield f"sent by a rank each step     {plan_bytes(sent)}; busiest {plan_bytes(busiest)}"
        yield from _parts(step.bytes_sent, plan_bytes)
        if step.bytes_between_nodes:
            yield f"leaves a node each step      {plan_bytes(step.bytes_between_nodes)}"
    yield f"time of a step               {plan_seconds(step.step_seconds)}"
    yield from _parts(step.seconds, plan_seconds)
    if plan.job_seconds is not None:
        taken, hours = plan_seconds(plan.job_seconds), plan.job_seconds * step.ranks / 3600
        yield f"time of the job              {taken} for {plan.steps:,} steps; {hours:.3g} device hours"
    yield from ("", *_table([("instead", "memory", "sent", "step", ""), *_alternatives(plan, step)]))
    yield from ("", text_chart(plan))
    shown = [point for point in plan.scaling if point.ranks in SHOWN_RANKS]
    yield "  " + "   ".join(
        f"{point.ranks}: {plan_seconds(point.step_seconds)}, {point.efficiency:.0%}" for point in shown
    )
    yield ""
    yield from (f"assumed: {assumption}" for assumption in plan.assumptions)


def _alternatives(plan: Plan, step: Prediction) -> Iterator[tuple[str, ...]]:
    yield "(as it is)", *_costs(step.memory, sum(step.bytes_sent.values()), step.step_seconds), ""
    for other in plan.alternatives:
        fits = "" if other.fits else "does not fit"
        yield other.change, *_costs(other.memory_bytes, other.bytes_sent, other.step_seconds), fits


def _costs(memory: float, sent: float, seconds: float) -> tuple[str, ...]:
    return plan_bytes(memory), plan_bytes(sent), plan_seconds(seconds)


def _parts(numbers: Mapping[str, float], shown: Callable[[float], str]) -> Iterator[str]:
    parts = [f"{kind.replace('_', ' ')} {shown(number)}" for kind, number in numbers.items() if number]
    line = "  "
    for part in parts:
        if len(line) + len(part) > 100:
            yield line.rstrip(", ") + ","
            line = "  "
        line += f"{part}, "
    yield line.rstrip(", ")


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
