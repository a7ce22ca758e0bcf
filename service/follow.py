"""Shows a job in a terminal until it ends: a progress bar with step, loss, accuracy and the time that is left."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from service.client import Client
from service.resources import Job

__all__ = ["EXIT_CODES", "follow", "mark"]

EXIT_CODES = {"SUCCEEDED": 0, "FAILED": 1, "CANCELLED": 3}
MARKS = {"QUEUED": "o", "SUCCEEDED": "+", "FAILED": "x", "CANCELLED": "-", "RECOVERING": "!", "CANCELLING": "!"}


def follow(client: Client, job_id: str, console: Console) -> Job:
    """Returns the job as it ended. Shows its phase, progress and newest metrics meanwhile."""
    columns = (
        TextColumn("{task.fields[phase]:<10}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f} steps", table_column=None),
        TextColumn("{task.fields[metrics]}"),
    )
    job = client.get(job_id)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(job.name, total=0, phase=job.status.phase, metrics="")
        for job in client.watch(job_id):
            at = job.status.progress
            progress.update(
                task,
                completed=at.step,
                total=at.total_steps or 0,
                phase=job.status.phase,
                metrics=_metrics(job),
            )
    console.print(_ending(job), markup=False, emoji=False, highlight=False)
    return job


def mark(job: Job) -> str:
    """Returns one character for the job's phase, for those who see no colours."""
    return MARKS.get(job.status.phase, ">")


def _metrics(job: Job) -> str:
    if job.status.message and not job.status.is_terminal:
        return job.status.message  # what it waits for
    shown = [
        f"{label} {job.metrics_latest[name]:.4f}"
        for label, name in (("loss", "loss"), ("accuracy", "accuracy"), ("test", "test_accuracy"))
        if name in job.metrics_latest
    ]
    eta_s = job.status.progress.eta_s
    if eta_s is not None and not job.status.is_terminal:
        shown.append(f"{int(eta_s) // 60}:{int(eta_s) % 60:02d} left")
    return "  ".join(shown)


def _ending(job: Job) -> str:
    result = job.status.result
    if result is None:
        why = ": ".join(part for part in (job.status.reason, job.status.message) if part)
        return f"{mark(job)} {job.name} {job.status.phase}{' - ' + why if why else ''}"
    accuracy = "" if result.test_accuracy is None else f", test accuracy {result.test_accuracy:.4f}"
    return f"{mark(job)} {job.name} SUCCEEDED at step {result.step}{accuracy}"
