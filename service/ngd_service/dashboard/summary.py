"""The head of a job's page: its name and phase, what went wrong, how far it is, and the button that cancels it."""

from collections.abc import Awaitable, Callable

from nicegui import ui

from ngd_service.dashboard.theme import phase_badge
from ngd_service.dashboard.units import ago, duration, number, percent
from ngd_service.resources import Job

__all__ = ["Summary", "progress_words"]


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

    def __init__(self, cancel: Callable[[], Awaitable[None]]) -> None:
        with ui.element("div").classes("fill"):
            with ui.element("div").classes("heading"):
                with ui.element("h1"):
                    self.name = ui.label()
                self.badge = ui.element("div").props("role=status aria-live=polite")
                ui.element("div").classes("spread")
                self.cancel = ui.button("Cancel job", icon="stop_circle", on_click=self._ask)
                self.cancel.props("outline no-caps color=negative")
            self.recipe = ui.label().classes("muted")
        with ui.element("div").classes("panel notice").props("role=alert") as self.notice:
            self.icon = ui.icon("error").props("aria-hidden=true")
            with ui.element("div").classes("notice-text"):
                self.reason = ui.label().style("font-weight: 600")
                self.message = ui.label()
        with ui.element("div").classes("panel"):
            with ui.element("div").classes("facts"):
                self.progress, self.time, self.loss = Fact("Progress"), Fact("Time left"), Fact("Training loss")
                self.accuracy, self.rate = Fact("Test accuracy"), Fact("Throughput")
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
        self.recipe.set_text(_recipe(job))
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

    def _show_facts(self, job: Job) -> None:
        progress, latest, batch = job.status.progress, job.metrics_latest, job.spec["batch"]
        total = progress.total_steps
        share = min(1.0, progress.step / total) if total else 0.0
        done = f"{100 * share:.0f}%"  # no finer: each change of the bar is sent
        self.progress.show(f"{progress.step:,}" + (f" / {total:,}" if total else ""), progress_words(job))
        self.filled.style(f"width: {done}").classes(replace=job.status.phase)
        self.track.props(f"aria-valuenow={100 * share:.0f}")
        self._show_time(job)
        self.loss.show(number(latest.get("loss")), f"test {number(latest.get('test_loss'))}")
        self.accuracy.show(percent(latest.get("test_accuracy")), f"training {percent(latest.get('accuracy'))}")
        workers = job.spec["resources"]["workers"]
        rate = latest.get("samples_per_s")
        self.rate.show("—" if rate is None else f"{number(round(rate))}/s", f"{batch['global_size']:,} samples a step")
        self.rate.value.props(f'title="{workers} workers"')

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


def _recipe(job: Job) -> str:
    spec = job.spec
    kinds = " · ".join(str(spec[part]["kind"]) for part in ("model", "data", "optimizer"))
    workers = spec["resources"]["workers"]
    attempt = f" · attempt {job.status.attempt}" if job.status.attempt > 1 else ""
    by = f" by {job.created_by}" if job.created_by else ""
    return f"{kinds} · {workers} worker{'' if workers == 1 else 's'}{attempt} · submitted {ago(job.created_at)}{by}"


def progress_words(job: Job) -> str:
    """The share of the steps that are done, and which ones the curves lack for good."""
    progress = job.status.progress
    share = min(1.0, progress.step / progress.total_steps) if progress.total_steps else 0.0
    lost = [f"{lost.first_step:,} to {lost.last_step:,}" for lost in progress.lost_steps]
    epoch = "" if progress.epoch is None else f", epoch {progress.epoch:.0f}"
    return f"steps, {100 * share:.0f}%{epoch}" + (f"; no record of {', '.join(lost)}" if lost else "")
