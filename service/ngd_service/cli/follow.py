"""Shows a job until it ends: on a terminal a progress bar, elsewhere a line whenever something has changed."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ngd_service.cli.terminal import harmless
from ngd_service.client.client import Client, ServiceError
from ngd_service.client.scores import bound, listed, score
from ngd_service.client.units import counted
from ngd_service.resources import Job, Metric, Result

__all__ = ["EXIT_CODES", "follow", "mark", "steps"]

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


def steps(job: Job) -> str:
    """Returns the steps done: "30/120", or "30" if the job has no known end; "" if it has not begun."""
    progress = job.status.progress
    total = f"/{progress.total_steps}" if progress.total_steps else ""
    return f"{progress.step}{total}" if total or progress.step else ""


def _as_bar(client: Client, job_id: str, console: Console) -> Job:
    columns = (
        TextColumn("{task.fields[phase]:<10}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[steps]}"),
        TextColumn("{task.fields[metrics]}", markup=False),
    )
    job = client.get(job_id)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(job.name, total=0, phase=job.status.phase, steps="", metrics="")
        for job in client.watch(job_id):
            at = job.status.progress
            progress.update(
                task,
                completed=at.step,
                total=at.total_steps or 0,
                phase=job.status.phase,
                steps=f"{steps(job) or 0} steps",
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
            place = f"step {steps(job)}" if steps(job) else ""
            _print(console, "  ".join(filter(None, (mark(job), job.name, job.status.phase, place, _metrics(job)))))
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
    shown = [_newest(metric, job.metrics_latest) for metric in job.metrics]
    shown.append(_skipped(job))
    eta_s = job.status.progress.eta_s
    if eta_s is not None and not job.status.is_terminal:
        shown.append(f"{int(eta_s) // 60}:{int(eta_s) % 60:02d} left")
    return "  ".join(filter(None, shown))


def _newest(metric: Metric, latest: Mapping[str, float]) -> str:
    """Returns the metric's newest value in training, and on the test data: "perplexity 5.31 (test 5.78)"."""
    training, test = (latest.get(name) for name in (metric.name, f"test_{metric.name}"))
    if training is None:
        return "" if test is None else f"test {metric.label} {score(metric, test)}"
    return f"{metric.label} {score(metric, training)}" + ("" if test is None else f" (test {score(metric, test)})")


def _skipped(job: Job) -> str:
    skipped = job.status.progress.skipped_samples
    return f"{counted(skipped, 'sample')} skipped" if skipped else ""


def _ending(job: Job) -> str:
    result = job.status.result
    if result is None:
        why = ": ".join(part for part in (job.status.reason, job.status.message) if part)
        return f"{mark(job)} {job.name} {job.status.phase}{' - ' + why if why else ''}"
    tested = f"test {listed(job.metrics, result.metrics)}" if result.metrics else ""
    ended = f"{mark(job)} {job.name} SUCCEEDED at step {result.step}"
    return ", ".join(filter(None, (ended, tested, _target(job, result), _skipped(job))))


def _target(job: Job, result: Result) -> str:
    """Returns whether the job has reached its target: "perplexity at most 12 reached at step 40"."""
    target = bound(job)
    if target is None:
        return ""
    metric, value = target
    reached = "not reached" if result.target_step is None else f"reached at step {result.target_step}"
    return f"{metric.label} {value} {reached}"
