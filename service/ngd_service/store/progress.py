"""Pure: folds arriving events into a job's progress and newest metrics."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ngd_service.store.holes import add_range, gaps, remove_ranges
from ngd_workers.contract.events import (
    Cancelled,
    Done,
    Evaluation,
    Numbered,
    Started,
    StepRecord,
    Steps,
    StepsLost,
    TargetReached,
    Waiting,
)

__all__ = [
    "LOST",
    "METRICS",
    "REWOUND",
    "STEP_VALUES",
    "TARGET",
    "WAITS_FOR",
    "JobProgress",
    "advance",
    "newly_lost",
    "remark",
    "summary",
]

# Names in the jobs table's progress beside step, total_steps, epoch, time_s, step_s, skipped_samples and data_share.
METRICS = "metrics"  # of the task, as its workers name them: name, label, better and unit of each
LOST = "lost_steps"  # ranges [first, last] of steps that were done and of which there is no record
REWOUND = "rewound"  # [from, to]: the step that was done, and the checkpoint that newly started workers go on from
BEGAN_S = "began_s"  # when the workers were up for the first time, in seconds since the epoch
TARGET = "target"  # step, and seconds from then on, of the first test that reached the job's target
WAITS_FOR = "waits_for"  # what the driver waits for before it starts its workers

STEP_VALUES = ("lr", "samples_per_s")  # of the newest step, beside its metrics
RATE_MEMORY = 0.8  # weight of the past in moving averages over steps: some five batches of steps


@dataclass(frozen=True, slots=True)
class JobProgress:
    """Where a job stands: JSON-ready dictionaries, as the jobs table keeps them."""

    progress: Mapping[str, Any]
    metrics: Mapping[str, Any]


def advance(job: JobProgress, numbered: Numbered, *, is_in_order: bool = True) -> JobProgress:
    """Returns the progress after one more event. is_in_order: all before it are there: what it passes over is lost."""
    progress = _with_holes(job.progress, numbered) if is_in_order else job.progress
    match numbered.event:
        case Started() as started:
            began = {BEGAN_S: progress.get(BEGAN_S, numbered.time_s)}
            return JobProgress(_after_start(progress, started) | began, job.metrics)
        case TargetReached(step=step) if TARGET not in progress:
            seconds = numbered.time_s - progress[BEGAN_S] if BEGAN_S in progress else None
            return JobProgress({**progress, TARGET: {"step": step, "seconds": seconds}}, job.metrics)
        case Steps(records=[*_, last] as records) if last.step > progress.get("step", 0):  # not an older delivery
            return JobProgress(_after_steps(progress, records), {**job.metrics, **_newest(last)})
        case StepsLost(last_step=last_step) if last_step > progress.get("step", 0):
            return JobProgress({**progress, "step": last_step}, job.metrics)
        case Waiting(message=message):
            return JobProgress({**progress, WAITS_FOR: message}, job.metrics)
        case Evaluation() | Done() as event:
            tested = {f"test_{name}": _plain(value) for name, value in event.metrics.items()}
            return JobProgress(progress, {**job.metrics, **tested})
    return JobProgress(progress, job.metrics)


def newly_lost(before: JobProgress, after: JobProgress, numbered: Numbered) -> list[list[int]]:
    """Returns the ranges of lost steps that this event has brought to light, unless it says so itself."""
    if isinstance(numbered.event, StepsLost):
        return []
    known = before.progress.get(LOST, [])
    return [one for one in after.progress.get(LOST, []) if not any(k[0] <= one[0] and one[1] <= k[1] for k in known)]


def remark(progress: Mapping[str, Any]) -> str | None:
    """Returns what there is to say of a job that runs: what its driver waits for, or that steps are done once more."""
    if progress.get(WAITS_FOR):
        return str(progress[WAITS_FOR])
    done, resumed = progress.get(REWOUND, (0, 0))
    if progress.get("step", 0) < done:
        return f"the workers were started again and go on from the checkpoint of step {resumed}; step {done} was done"
    return None


def summary(numbered: Numbered) -> dict[str, Any]:
    """Returns what the event list keeps of an event: of steps the range and the newest, for the records lie apart."""
    event = numbered.event
    if isinstance(event, Steps):
        if not event.records:
            return {}
        first, last = event.records[0], event.records[-1]
        return {"first_step": first.step, "last_step": last.step, "latest": {"epoch": last.epoch, **_newest(last)}}
    plain: dict[str, Any] = _plain(event.model_dump(mode="python", exclude={"kind"}))
    return plain


def _with_holes(progress: Mapping[str, Any], numbered: Numbered) -> dict[str, Any]:
    """Returns the progress with the steps that are known to be lost: those passed over, less those done once more."""
    done = int(progress.get("step", 0))
    lost: list[list[int]] = progress.get(LOST, [])
    match numbered.event:
        case Started(resumed_step=step) | Done(step=step) | Cancelled(step=step):
            lost = add_range(lost, done + 1, step)
        case StepsLost(first_step=first, last_step=last) if last > 0:
            lost = add_range(lost, first, last)
        case Steps(records=records):
            steps = [record.step for record in records]
            for first, last in gaps(done, steps):
                lost = add_range(lost, first, last)
            lost = remove_ranges(lost, steps)
    return {**progress, LOST: lost} if lost or LOST in progress else dict(progress)


def _after_start(progress: Mapping[str, Any], started: Started) -> dict[str, Any]:
    done, resumed = int(progress.get("step", 0)), started.resumed_step
    after: dict[str, Any] = {
        "step": resumed,
        "total_steps": started.total_steps,
        "epoch": resumed / started.steps_per_epoch if started.steps_per_epoch else None,
    }
    if started.metrics:
        after[METRICS] = [metric.model_dump() for metric in started.metrics]
    kept = {name: progress[name] for name in (LOST, METRICS, TARGET) if name in progress and name not in after}
    return after | kept | ({REWOUND: [done, resumed]} if resumed < done else {})


def _after_steps(progress: Mapping[str, Any], records: list[StepRecord]) -> dict[str, Any]:
    last = records[-1]
    then_s, then_step = progress.get("time_s"), progress.get("step", 0)
    if then_s is None:
        then_s, then_step = records[0].time_s, records[0].step
    step_s = progress.get("step_s")
    if last.step > then_step and last.time_s > then_s:
        newest = (last.time_s - then_s) / (last.step - then_step)
        step_s = _moved(step_s, newest)
    return {
        **progress,
        "step": last.step,
        "epoch": last.epoch,
        "time_s": last.time_s,
        "step_s": step_s,
        "skipped_samples": last.skipped_samples,
        "data_share": _moved(progress.get("data_share"), _data_share(records)),
    }


def _data_share(records: list[StepRecord]) -> float | None:
    """Returns the share of the time of these steps in which they waited for data; None: they do not tell."""
    timed = [record.seconds for record in records if "data" in record.seconds]
    total = sum(sum(seconds.values()) for seconds in timed)
    return sum(seconds["data"] for seconds in timed) / total if total > 0 else None


def _moved(average: float | None, newest: float | None) -> float | None:
    if average is None or newest is None:
        return average if newest is None else newest
    return RATE_MEMORY * average + (1 - RATE_MEMORY) * newest


def _newest(record: StepRecord) -> dict[str, Any]:
    values = {name: getattr(record, name) for name in STEP_VALUES} | record.metrics
    return {name: _plain(value) for name, value in values.items() if value is not None}


def _plain(value: Any) -> Any:
    """Returns the value as JSON can carry it: PostgreSQL's JSON type has no NaN and no infinity."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value
