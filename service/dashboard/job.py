"""The page of one job: how far it is, its curves, the age of its statistics, what happened, its log and its spec."""

import asyncio
from collections.abc import Callable, Sequence

import yaml
from fastapi import Request
from nicegui import ui

from service.client import AsyncClient, NotFoundError, ServiceError, UnauthorizedError
from service.dashboard.activity import LOG_LINES, EventPanel, LogPanel
from service.dashboard.curves import Mark
from service.dashboard.heat_map import HeatMap, columns_for
from service.dashboard.summary import Summary
from service.dashboard.theme import Freshness, ask_to_log_in, empty, page_frame, panel, reader
from service.dashboard.training import Training
from service.resources import Event, Job

__all__ = ["marks", "register"]

POLL_S = 1.0
SLOW_EVERY = 2  # polls between two readings of what travels whole: the heat map and the log
EVENTS_AT_ONCE = 1_000
LEGEND = (("attempt", "new attempt"), ("restart", "workers restarted"), ("checkpoint", "checkpoint"))


def register(api_of: Callable[[Request], AsyncClient]) -> None:
    """Serves the page at /jobs/{id}, reading through what `api_of` gives its reader."""

    @ui.page("/jobs/{job_id}")
    async def job(request: Request, job_id: str) -> None:
        with page_frame("Job", reader(request)) as freshness:
            page = JobPage(api_of(request), job_id, freshness)
        timer = ui.timer(POLL_S, page.refresh)
        page.timer = timer
        ui.on("visible", lambda event: setattr(timer, "active", event.args and not page.is_complete))


class JobPage:
    """The panels of the page, and what was read last."""

    timer: ui.timer

    def __init__(self, api: AsyncClient, job_id: str, freshness: Freshness) -> None:
        self.api = api
        self.job_id = job_id
        self.freshness = freshness
        self.reading = asyncio.Lock()  # events that two reads at once both got would be listed twice
        self.polls = 0
        self.num_rows = 1
        self.next_after = 0
        self.events: list[Event] = []
        self.is_complete = False
        self.loading = ui.skeleton().style("height: 220px; width: 100%").props('aria-label="Loading the job"')
        self.missing = empty(
            "search_off",
            "There is no such job",
            f"The service knows no job {job_id}.",
        )
        with self.missing:
            ui.link("All jobs", "/")
        self.missing.set_visibility(False)
        with ui.element("div").classes("sections") as self.content:
            self._lay_out()
        self.content.set_visibility(False)

    def _lay_out(self) -> None:
        self.summary = Summary(self._cancel)
        self.legend = ui.element("div").classes("legend").props('aria-label="Vertical lines in the charts"')
        with self.legend:
            for kind, meaning in LEGEND:
                with ui.element("span"):
                    ui.element("i").classes(kind)
                    ui.label(meaning)
        with ui.element("div").classes("grid"):
            self.training = Training()
            self.heat_map = HeatMap("Age of the statistics in use")
            self.log = LogPanel()
            self.event_panel = EventPanel()
            self._lay_out_spec()

    def _lay_out_spec(self) -> None:
        with panel("Spec") as head:
            place = ui.element("div").classes("panel-body")
        with place, ui.element("pre").classes("code mono spec").props('tabindex=0 aria-label="Spec"'):
            self.spec = ui.label()
        with head:
            ui.element("div").classes("spread")
            copy = ui.button(icon="content_copy", color=None, on_click=lambda: ui.clipboard.write(self.spec.text))
            copy.props('flat round dense aria-label="Copy the spec" title="Copy"').classes("plain")

    async def refresh(self) -> None:
        """Brings the page up to date; rests once the job has ended and all of it is here."""
        async with self.reading:
            await self._refresh()

    async def _refresh(self) -> None:
        try:
            job = await self.api.get(self.job_id)
            await self._read(job)
        except NotFoundError:
            self.missing.set_visibility(True)
            self.loading.set_visibility(False)
            self._rest()
            return
        except UnauthorizedError:
            ask_to_log_in()
            return
        except ServiceError as error:
            self.freshness.stale(str(error))
            return
        self.freshness.live()
        if job.status.is_terminal:
            self._rest()

    async def _read(self, job: Job) -> None:
        is_first = self.polls == 0
        self.summary.show(job)
        if is_first:
            ui.page_title(f"{job.name} · ngd-dist")
            self.spec.set_text(yaml.safe_dump(job.spec, sort_keys=False))
            self.loading.set_visibility(False)
            self.content.set_visibility(True)
        await self._read_events()
        await self.training.refresh(self.api, self.job_id, whole=job.status.is_terminal)
        if self.polls % SLOW_EVERY == 0 or job.status.is_terminal:
            await self._read_statistics(job)
            self.log.show(await self.api.logs(self.job_id, tail=LOG_LINES))
        self.polls += 1

    async def _read_events(self) -> None:
        new: list[Event] = []
        while page := (await self.api.events(self.job_id, after=self.next_after, limit=EVENTS_AT_ONCE)):
            new += page.events
            self.next_after = page.next_after
            if len(page.events) < EVENTS_AT_ONCE:
                break
        told = [event for event in new if event.kind != "steps"]
        if told:
            self.events += told
            self.event_panel.add(told)
            found = marks(self.events)
            self.training.mark(found)
            self.legend.set_visibility(bool(found))
        if any(event.kind == "started" and event.data["resumed_step"] for event in told):
            self.training.redo()

    async def _read_statistics(self, job: Job) -> None:
        known = await self.api.statistics(self.job_id, max_points=columns_for(self.num_rows))
        self.num_rows = len(known.names)
        if known.names:
            self.heat_map.replace(known)
        elif job.status.progress.step:
            self.heat_map.explain(f"{job.spec['optimizer']['kind']} keeps no statistics")

    async def _cancel(self) -> None:
        try:
            await self.api.cancel(self.job_id)
        except ServiceError as error:
            ui.notify(f"The job was not cancelled: {error}", type="negative")
        await self.refresh()

    def _rest(self) -> None:
        self.is_complete = True
        self.freshness.ended()
        self.timer.deactivate()


def marks(events: Sequence[Event]) -> list[Mark]:
    """The vertical lines of a job: where attempts began, where workers were restarted, where checkpoints lie."""
    found = []
    attempt = 0
    for event in events:
        if event.kind == "checkpoint":
            found.append(Mark(event.data["step"], "checkpoint", f"checkpoint {event.data['step']}"))
        elif event.kind == "started":
            is_new = event.attempt != attempt
            attempt = event.attempt or 0
            if is_new and attempt > 1:
                found.append(Mark(event.data["resumed_step"], "attempt", f"attempt {attempt}"))
            elif not is_new:
                found.append(Mark(event.data["resumed_step"], "restart", "restart"))
    return found
