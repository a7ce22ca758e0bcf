"""The head of a job's page: its name and phase, what went wrong, how far it is, and the button that cancels it."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from nicegui import ui

from ngd_service.client.scores import bound, score
from ngd_service.client.units import NOTHING, ago, counted, duration, number, percent
from ngd_service.dashboard.origin import clone_address
from ngd_service.dashboard.theme import phase_badge
from ngd_service.resources import Job, Metric

__all__ = ["Summary", "facts_of", "progress_words", "recipe", "steps"]

MOST_SCORES = 3  # metrics beside the other facts; each has its chart


class Fact:
    """A named number with a line of detail under it."""

    def __init__(self, name: str) -> None:
        with ui.element("div").classes("fact"):
            self.name = ui.label(name).classes("fact-name")
            self.value = ui.label().classes("fact-value")
            self.more = ui.label().classes("fact-more")

    def show(self, value: str, more: str = "") -> None:
        self.value.set_text(value)
        self.more.set_text(more)


class Summary:
    """Shows a job; `cancel` is called once the reader has confirmed."""

    def __init__(self, cancel: Callable[[], Awaitable[None]], job_id: str) -> None:
        with ui.element("div").classes("fill"):
            with ui.element("div").classes("heading"):
                with ui.element("h1"):
                    self.name = ui.label()
                self.badge = ui.element("div").props("role=status aria-live=polite")
                ui.element("div").classes("spread")
                with ui.element("div").classes("actions"):
                    compare = ui.link("Compare with ...", f"/?selected={job_id}").classes("button-link")
                    compare.props("data-key=c aria-keyshortcuts=c")
                    clone = ui.link("Clone", clone_address(job_id)).classes("button-link")
                    clone.props('title="Submit a job with the same spec"')
                    self.cancel = ui.button("Cancel job", icon="stop_circle", on_click=self._ask)
                    self.cancel.props("outline no-caps color=negative")
            self.recipe = ui.label().classes("muted")
        with ui.element("div").classes("panel notice").props("role=alert") as self.notice:
            self.icon = ui.icon("error").props("aria-hidden=true")
            with ui.element("div").classes("notice-text"):
                self.reason = ui.label().style("font-weight: 600")
                self.message = ui.label()
        self.beneath_notice = ui.element("div").style("display: contents")  # for the lines of the log
        with ui.element("div").classes("panel notice waits").props("role=alert") as self.hole:
            ui.icon("warning").props("aria-hidden=true")
            self.skipped = ui.label().classes("notice-text")
        with ui.element("div").classes("panel"):
            with ui.element("div").classes("facts"):
                self.progress, self.time = Fact("Progress"), Fact("Time left")
                self.place = ui.element("div").style("display: contents")  # of the metrics, which the workers name
                self.rate = Fact("Throughput")
            self.scores: list[Fact] = []
            self.track = (
                ui.element("div")
                .classes("track")
                .props('role=progressbar aria-label="steps done" aria-valuemin=0 aria-valuemax=100')
            )
            with self.track:
                self.filled = ui.element("div")
        self.phase = ""
        self._confirm = self._dialog(cancel)

    def show(self, job: Job) -> None:
        """Brings all of it up to date."""
        status = job.status
        self.name.set_text(job.name)
        self.recipe.set_text(recipe(job))
        if status.phase != self.phase:
            self.phase = status.phase
            self.badge.clear()
            with self.badge:
                phase_badge(status.phase, large=True)
        self.cancel.set_visibility(not status.is_terminal and job.desired_state == "RUNNING")
        self._show_notice(job)
        self._show_facts(job)

    def _show_notice(self, job: Job) -> None:
        """Says why a job failed or is tried again, or what it waits for."""
        status = job.status
        is_trouble = status.phase in ("FAILED", "RECOVERING")
        waits = status.message is not None and not status.is_terminal and not is_trouble
        self.notice.set_visibility(waits or (is_trouble and bool(status.message or status.reason)))
        self.notice.classes(add="waits" if waits else None, remove=None if waits else "waits")
        self.icon.set_name("hourglass_empty" if waits else "error")
        self.reason.set_text(status.reason or "")
        self.reason.set_visibility(bool(status.reason))
        self.message.set_text(status.message or "")
        skipped = status.progress.skipped_samples
        self.hole.set_visibility(skipped > 0)
        self.skipped.set_text(
            f"{counted(skipped, 'sample')} could not be read and {'was' if skipped == 1 else 'were'} left out: the "
            f"model has not learned from {'it' if skipped == 1 else 'them'}"
        )

    def _show_facts(self, job: Job) -> None:
        progress, latest = job.status.progress, job.metrics_latest
        total = progress.total_steps
        share = min(1.0, progress.step / total) if total else 0.0
        done = f"{100 * share:.0f}%"  # no finer: each change of the bar is sent
        self.progress.show(f"{progress.step:,}" + (f" / {total:,}" if total else ""), progress_words(job))
        self.filled.style(f"width: {done}").classes(replace=job.status.phase)
        self.track.props(f"aria-valuenow={100 * share:.0f}")
        self._show_time(job)
        told = facts_of(job)
        with self.place:
            self.scores += [Fact("") for _ in range(len(told) - len(self.scores))]
        for fact, (name, value, more) in zip(self.scores, told, strict=False):
            fact.name.set_text(name)
            fact.show(value, more)
        rate = latest.get("samples_per_s")
        self.rate.show(NOTHING if rate is None else f"{number(round(rate))}/s", _pace(job))
        self.rate.value.props(f'title="{workers_of(job)}"')

    def _show_time(self, job: Job) -> None:
        self.time.name.set_text("Took" if job.finished_at else "Time left")
        if job.finished_at is None:
            started = "not started" if job.started_at is None else f"started {ago(job.started_at)}"
            self.time.show(duration(job.status.progress.eta_s), started)
        else:
            took = None if job.started_at is None else (job.finished_at - job.started_at).total_seconds()
            self.time.show(duration(took), f"ended {ago(job.finished_at)}")

    def _dialog(self, cancel: Callable[[], Awaitable[None]]) -> ui.dialog:
        async def confirmed() -> None:
            dialog.close()
            await cancel()

        with ui.dialog() as dialog, ui.card().classes("dialog"):
            with ui.element("h2"):
                ui.label("Cancel this job?")
            ui.label("Its workers stop after the step they are in. What it has learned and logged so far stays here.")
            with ui.row().classes("fill justify-end"):
                ui.button("Keep it running", on_click=dialog.close).props("flat no-caps autofocus")
                ui.button("Cancel job", on_click=confirmed).props("unelevated no-caps color=negative")
        return dialog

    def _ask(self) -> None:
        self._confirm.open()


def facts_of(job: Job) -> list[tuple[str, str, str]]:
    """Returns name, value and detail of the metrics that count most: of the test data, once they are tested."""
    return [_fact_of(job, metric) for metric in job.metrics[:MOST_SCORES]]


def _fact_of(job: Job, metric: Metric) -> tuple[str, str, str]:
    training, test = (job.metrics_latest.get(name) for name in (metric.name, f"test_{metric.name}"))
    more = []
    if test is not None and training is not None:
        more.append(f"training {score(metric, training)}")
    target = bound(job)
    if target is not None and target[0].name == metric.name:
        result = job.status.result
        reached = [] if result is None or result.target_step is None else [f"reached at step {result.target_step:,}"]
        more += [f"target {target[1]}", *reached]
    if test is None and training is None:
        return metric.label[:1].upper() + metric.label[1:], NOTHING, ", ".join(more)
    which, value = ("Training", training) if test is None else ("Test", test)
    return f"{which} {metric.label}", score(metric, value), ", ".join(more)


def _pace(job: Job) -> str:
    """Returns the size of a batch, and how much of a step passes in waiting for it; each if it is known."""
    share, batch = job.status.progress.data_share, job.spec.get("batch")
    size = f"{batch['global_size']:,} samples a step" if batch else ""
    return ", ".join(filter(None, (size, "" if share is None else f"{percent(share)} waiting for data")))


def recipe(job: Job) -> str:
    """Returns the job's choices in a line, with its workers and its age."""
    spec = job.spec
    parts = [spec[part] for part in ("model", "data", "task", "optimizer", "train") if part in spec]
    kinds = [_kind(part) for part in parts]
    attempt = [f"attempt {job.status.attempt}"] if job.status.attempt > 1 else []
    by = f" by {job.created_by}" if job.created_by else ""
    return " · ".join([*kinds, workers_of(job), *attempt, f"submitted {ago(job.created_at)}{by}"])


def workers_of(job: Job) -> str:
    """Returns "2 workers", or "1 to 2 workers" of an elastic job."""
    resources = job.spec["resources"]
    fewest = resources.get("min_workers")
    return ("" if fewest is None else f"{fewest:,} to ") + counted(resources["workers"], "worker")


def _kind(part: Mapping[str, Any]) -> str:
    """Returns a choice in a few words: "gpt", "language modelling", "mine:model", "torchvision resnet18"."""
    kind = part.get("kind", "function")
    if kind == "function":
        return str(part["function"])
    return " ".join([kind.replace("_", " "), *filter(None, [part.get("name")])])


def steps(job: Job) -> str:
    """Returns the steps done, and of how many if the job has a known end."""
    progress = job.status.progress
    if progress.total_steps:
        return f"{progress.step:,} / {progress.total_steps:,}"
    return f"{progress.step:,}" if progress.step else "not started"


def progress_words(job: Job) -> str:
    """The share of the steps that are done, and which ones the curves lack for good."""
    progress = job.status.progress
    lost = [f"{lost.first_step:,} to {lost.last_step:,}" for lost in progress.lost_steps]
    share = f"{100 * min(1.0, progress.step / progress.total_steps):.0f}%" if progress.total_steps else ""
    epoch = "" if progress.epoch is None else f"epoch {progress.epoch:.0f}"
    words = ", ".join(filter(None, ("steps", share, epoch)))
    return words + (f"; no record of {', '.join(lost)}" if lost else "")
