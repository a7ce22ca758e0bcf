"""Pure: what a job's progress and newest metrics become as its workers' events arrive."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workers.events import Done, Evaluation, Numbered, Started, StepRecord, Steps

__all__ = ["Standing", "advance", "summary"]

RATE_MEMORY = 0.8  # weight of the past in the moving average of seconds per step: some five batches of steps


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a job stands: JSON-ready dictionaries, as the jobs table keeps them."""

    progress: Mapping[str, Any]
    metrics: Mapping[str, Any]


def advance(standing: Standing, numbered: Numbered) -> Standing:
    """Returns the standing after one more event."""
    match numbered.event:
        case Started() as started:
            progress = {
                "step": started.resumed_step,
                "total_steps": started.total_steps,
                "epoch": started.resumed_step / started.steps_per_epoch if started.steps_per_epoch else None,
            }
            return Standing(progress, standing.metrics)
        case Steps(records=[*_, last] as records):
            return Standing(_after_steps(standing.progress, records), {**standing.metrics, **_newest(last)})
        case Evaluation() | Done() as event:
            tested = {"test_loss": _plain(event.test_loss), "test_accuracy": _plain(event.test_accuracy)}
            return Standing(standing.progress, {**standing.metrics, **tested})
    return standing


def summary(numbered: Numbered) -> dict[str, Any]:
    """Returns what the event list keeps of an event: of steps the range and the newest, for the records lie apart."""
    event = numbered.event
    if isinstance(event, Steps):
        if not event.records:
            return {}
        first, last = event.records[0], event.records[-1]
        return {"first_step": first.step, "last_step": last.step, "latest": {"epoch": last.epoch, **_newest(last)}}
    plain: dict[str, Any] = event.model_dump(mode="python", exclude={"kind"})
    return {name: _plain(value) for name, value in plain.items()}


def _after_steps(progress: Mapping[str, Any], records: list[StepRecord]) -> dict[str, Any]:
    last = records[-1]
    then_s, then_step = progress.get("time_s"), progress.get("step", 0)
    if then_s is None:
        then_s, then_step = records[0].time_s, records[0].step
    step_s = progress.get("step_s")
    if last.step > then_step and last.time_s > then_s:
        newest = (last.time_s - then_s) / (last.step - then_step)
        step_s = newest if step_s is None else RATE_MEMORY * step_s + (1 - RATE_MEMORY) * newest
    return {**progress, "step": last.step, "epoch": last.epoch, "time_s": last.time_s, "step_s": step_s}


def _newest(record: StepRecord) -> dict[str, Any]:
    return {name: _plain(getattr(record, name)) for name in ("loss", "accuracy", "lr", "samples_per_s")}


def _plain(value: Any) -> Any:
    """Returns the value as JSON can carry it: PostgreSQL's JSON type has no NaN and no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value
