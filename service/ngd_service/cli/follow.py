"""Shows a job until it ends: on a terminal a progress bar, elsewhere a line whenever something has changed."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ngd_service.cli.terminal import harmless
from ngd_service.client.client import Client, ServiceError
from ngd_service.resources import Job

__all__ = ["EXIT_CODES", "follow", "mark"]

EXIT_CODES = {"SUCCEEDED": 0, "FAILED": 1, "CANCELLED": 3}
MARKS = {"QUEUED": "o", "SUCCEEDED": "+", "FAILED": "x", "CANCELLED": "-", "RECOVERING": "!", "CANCELLING": "!"}
LINE_EVERY_S = 5.0  # of steps alone; any other change has its line at once
LOG_ENDS_WITHIN_S = 10.0


def follow(client: Client, job_id: str, console: Console, *, with_log: bool = False) -> Job:
    """Returns the job as it ended. Shows its phase, progress and newest metrics meanwhile, and its log if asked."""
    shown = _as_bar if console.is_terminal else _as_lines
    with _log_beside(client, job_id, console, is_wanted=with_log):
        job = shown(client, job_id, console)
    _print(console, _ending(job))
    return job


def mark(job: Job) -> str:
    """Returns one character for the job's phase, for those who see no colours."""
    return MARKS.get(job.status.phase, ">")


def _as_bar(client: Client, job_id: str, console: Console) -> Job:
    columns = (
        TextColumn("{task.fields[phase]:<10}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f} steps", table_column=None),
        TextColumn("{task.fields[metrics]}", markup=False),
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
                metrics=harmless(_metrics(job)),
            )
    return job


def _as_lines(client: Client, job_id: str, console: Console) -> Job:
    job = client.get(job_id)
    said: tuple[str, str | None] | None = None
    said_at_s = step = 0
    for job in client.watch(job_id):
        at, now_s = job.status.progress, int(time.monotonic())
        is_news = (job.status.phase, job.status.message) != said
        has_moved = at.step != step and now_s - said_at_s >= LINE_EVERY_S
        if not job.status.is_terminal and (is_news or has_moved):
            said, said_at_s, step = (job.status.phase, job.status.message), now_s, at.step
            steps = f"step {at.step}/{at.total_steps}" if at.total_steps else ""
            _print(console, "  ".join(filter(None, (mark(job), job.name, job.status.phase, steps, _metrics(job)))))
    return job


@contextmanager
def _log_beside(client: Client, job_id: str, console: Console, *, is_wanted: bool) -> Iterator[None]:
    """Prints the job's log as it comes, from a thread that ends with the job."""

    def show() -> None:
        try:
            for chunk in client.follow_logs(job_id):
                _print(console, chunk.text.removesuffix("\n"))
        except ServiceError as error:
            _print(console, f"the log is no longer shown: {error}")

    thread = threading.Thread(target=show, name="log", daemon=True)
    if is_wanted:
        thread.start()
    yield
    if is_wanted:
        thread.join(LOG_ENDS_WITHIN_S)


def _print(console: Console, text: str) -> None:
    console.print(harmless(text), markup=False, emoji=False, highlight=False, soft_wrap=True)
    console.file.flush()  # a pipe's reader gets the line now


def _metrics(job: Job) -> str:
    if job.status.message and not job.status.is_terminal:
        return job.status.message  # the reason for waiting
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
