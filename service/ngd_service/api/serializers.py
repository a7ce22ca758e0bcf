"""Records of the store as resources of the API."""

from typing import Any

from ngd_service.job_state import TERMINAL
from ngd_service.resources import Event, Job, Metric, Progress, Result, Status, StepRange
from ngd_service.store.base import EventRecord, JobRecord
from ngd_service.store.progress import LOST, METRICS, STEP_VALUES, TARGET
from ngd_workers.contract.rundir import Outcome

__all__ = ["event_resource", "job_resource"]


def job_resource(job: JobRecord) -> Job:
    """Returns the job as the API shows it, with the time that is left at the newest rate."""
    return Job(
        id=job.id,
        name=job.name,
        spec=job.spec,
        desired_state=job.state.desired,
        status=Status(
            phase=job.state.phase,
            is_terminal=job.state.phase in TERMINAL,
            reason=job.reason,
            message=job.message,
            attempt=job.attempt,
            progress=_progress(job),
            result=None if job.result is None else _result(job.result),
        ),
        metrics=_metrics(job),
        metrics_latest=job.metrics_latest,
        created_at=job.created_at,
        created_by=job.created_by,
        started_at=job.started_at,
        finished_at=job.finished_at,
        resource_version=job.resource_version,
    )


def event_resource(event: EventRecord) -> Event:
    """Returns the event as the API shows it."""
    return Event(
        id=event.id,
        job_id=event.job_id,
        attempt=event.attempt,
        seq=event.seq,
        kind=event.kind,
        time=event.time,
        data=event.data,
    )


def _progress(job: JobRecord) -> Progress:
    step, total_steps = job.progress.get("step", 0), job.progress.get("total_steps")
    step_s = job.progress.get("step_s")
    is_moving = job.state.phase not in TERMINAL and total_steps is not None and step_s is not None
    eta_s = round((total_steps - step) * step_s, 1) if is_moving else None
    lost = [StepRange(first_step=first, last_step=last) for first, last in job.progress.get(LOST, [])]
    epoch, target = job.progress.get("epoch"), _target(job)
    return Progress(
        step=step,
        total_steps=total_steps,
        epoch=epoch,
        eta_s=eta_s,
        lost_steps=lost,
        skipped_samples=job.progress.get("skipped_samples", 0),
        target_step=target.get("step"),
        target_s=target.get("seconds"),
        data_share=job.progress.get("data_share"),
    )


def _target(job: JobRecord) -> dict[str, Any]:
    """Returns when the target was reached; what ran under an earlier version has the step of its result alone."""
    at_end = None if job.result is None else job.result.target_step
    known: dict[str, Any] = job.progress.get(TARGET, {"step": at_end})
    return known


def _metrics(job: JobRecord) -> list[Metric]:
    """Returns the metrics that the workers named at their start, and the others that they have reported since.

    A loop of the user's own may name none, and version 0.1 named none.
    """
    named = [Metric.model_validate(metric) for metric in job.progress.get(METRICS, [])]
    reported = dict.fromkeys(name.removeprefix("test_") for name in job.metrics_latest if name not in STEP_VALUES)
    others = [name for name in reported if name not in {metric.name for metric in named}]
    others.sort(key=lambda name: name == "loss")  # last, as tasks have it
    known = [*named, *(Metric(name=name, label=name.replace("_", " ")) for name in others)]
    target = (job.spec.get("target") or {}).get("metric")
    return sorted(known, key=lambda metric: metric.name != target)


def _result(outcome: Outcome) -> Result:
    return Result(
        metrics=outcome.metrics,
        step=outcome.step,
        target_step=outcome.target_step,
        seconds=outcome.seconds,
    )
