"""The page of one job: how far it is, its curves, the age of its statistics, what happened, its log and its spec."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml
from fastapi import Request, Response
from nicegui import ui

from ngd_service.client.client import AsyncClient, ServiceError, UnauthorizedError
from ngd_service.dashboard.activity import MOST_EVENTS, TOLD, EventPanel
from ngd_service.dashboard.checkpoints import CheckpointPanel
from ngd_service.dashboard.environment import EnvironmentPanel, FallbackPanel
from ngd_service.dashboard.heat_map import HeatMap
from ngd_service.dashboard.inversions import InversionsPanel
from ngd_service.dashboard.layers import LayersPanel, SpectraPanel
from ngd_service.dashboard.logs import LogPanel
from ngd_service.dashboard.marks import LEGEND, MARKED, MOST_MARKS, marks
from ngd_service.dashboard.plain import unknown, unknown_jobs_page
from ngd_service.dashboard.ranks import PhasesByRank, Workers
from ngd_service.dashboard.sections import Sections
from ngd_service.dashboard.summary import Summary
from ngd_service.dashboard.theme import RECONNECT_S, Freshness, ask_to_log_in, page_frame, panel, reader
from ngd_service.dashboard.timeline import KINDS, Timeline
from ngd_service.dashboard.training import Training
from ngd_service.dashboard.trouble import Trouble
from ngd_service.dashboard.view import View, ViewBar
from ngd_service.resources import Event, Job, Metric

__all__ = ["register"]

STYLE = Path(__file__).with_name("job.css")
POLL_S = 1.0
POLLS_PER_ANATOMY = 5
CLOCK_S = 10.0  # between two looks at the clock, once nothing else changes


def register(api_of: Callable[[Request], AsyncClient]) -> None:
    """Serves the page at /jobs/{id}, reading through what `api_of` gives its reader."""

    @ui.page("/jobs/{job_id}", reconnect_timeout=RECONNECT_S)
    async def job(request: Request, job_id: str) -> Response | None:
        api = api_of(request)
        if await unknown(api, [job_id]):
            return unknown_jobs_page([job_id])
        ui.add_css(STYLE)
        with page_frame("Job", reader(request)) as freshness:
            page = JobPage(api, job_id, freshness, View.of(request.query_params))
        timer = ui.timer(POLL_S, page.refresh)
        page.timer = timer
        ui.on("visible", lambda event: setattr(timer, "active", event.args))
        ui.on("zoomed", lambda event: page.refine(event.args))
        return None


class JobPage:
    """The panels of the page, and what was read last."""

    timer: ui.timer

    def __init__(self, api: AsyncClient, job_id: str, freshness: Freshness, view: View | None = None) -> None:
        self.api = api
        self.job_id = job_id
        self.freshness = freshness
        self.view = view or View()
        self.reading = asyncio.Lock()  # events that two reads at once both got would be listed twice
        self.client = ui.context.client
        self.job: Job | None = None  # as it was read last
        self.polls = 0
        self.told_until = 0  # the step up to which layers and ranks were read
        self.next_after = 0
        self.told_version: int | None = None  # of the job when its events were read
        self.attempt = 0
        self.has_started = False
        self.is_complete = False
        self.loading = ui.skeleton().style("height: 220px; width: 100%").props('aria-label="Loading the job"')
        with ui.element("div").classes("sections") as self.content:
            self._lay_out()
        self.content.set_visibility(False)

    def _lay_out(self) -> None:
        self.summary = Summary(self._cancel, self.job_id)
        with self.summary.beneath_notice:
            self.trouble = Trouble()
        self.sections = Sections()
        self.training = Training(self.view)
        with self.sections.section("Metrics"):
            ViewBar(self.view, self.training.redraw)
            self._lay_out_legend()
            with ui.element("div").classes("grid"):
                self.training.lay_out_metrics()
        with self.sections.section("Curvature"), ui.element("div").classes("grid"):
            self.training.lay_out_curvature()
            self.heat_map = HeatMap(self.view)
            self.heat_map.on_recolour = self._recolour
            self.layers, self.spectra = LayersPanel(), SpectraPanel()
            self.inversions = InversionsPanel()
            self.fallback = FallbackPanel()
        with self.sections.section("Step"), ui.element("div").classes("grid"):
            self.training.lay_out_step()
            self.phases_by_rank = PhasesByRank()
        with self.sections.section("Workers"), ui.element("div").classes("grid"):
            self.workers = Workers()
            self.training.lay_out_workers()
        with self.sections.section("Log", is_titled=False), ui.element("div").classes("grid"):
            self.log = LogPanel(self.api, self.job_id)
        with self.sections.section("History"), ui.element("div").classes("grid"):
            self.timeline, self.event_panel = Timeline(), EventPanel()
            self.environment = EnvironmentPanel()
            self.checkpoints = CheckpointPanel(self.api)
        with self.sections.section("Spec", is_titled=False):
            self._lay_out_spec()
        self._show_sections(num_statistics=0)

    def _lay_out_legend(self) -> None:
        self.legend = ui.element("div").classes("legend").props('aria-label="Vertical lines in the charts"')
        with self.legend:
            for kind, meaning in LEGEND:
                with ui.element("span"):
                    ui.element("i").classes(kind)
                    ui.label(meaning)
        self.legend.set_visibility(False)

    def _show_sections(self, num_statistics: int) -> None:
        """A job whose workers have never started has no empty charts, and one without statistics no curvature."""
        for name in ("Metrics", "Step", "Workers"):
            self.sections.show(name, is_needed=self.has_started)
        self.sections.show("Curvature", is_needed=num_statistics > 0)
        self.environment.whole.set_visibility(self.has_started)
        self.checkpoints.whole.set_visibility(self.has_started)

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
        """Brings the page up to date; once the job has ended and all of it is here, only the ages in it change."""
        if self.is_complete:
            if self.job is not None:
                self.summary.show(self.job)
            return
        if self.client.has_socket_connection:  # nobody reads it else; NiceGUI keeps the page for a while
            async with self.reading:
                await self._refresh()

    async def _refresh(self) -> None:
        try:
            job = await self.api.get(self.job_id)
            await self._read(job)
        except UnauthorizedError:
            ask_to_log_in()
            return
        except ServiceError as error:
            self.freshness.stale(str(error))
            return
        if job.status.is_terminal:
            self.freshness.ended("The job has ended; nothing here will change")
            self._rest()
        else:
            self.freshness.live()

    async def _read(self, job: Job) -> None:
        is_new, has_ended = self.job is None, job.status.is_terminal
        is_changed = self.job is None or job.resource_version != self.job.resource_version
        self.summary.show(job)
        if is_new:
            ui.page_title(f"{job.name} · ngd-dist")
            self.spec.set_text(yaml.safe_dump(job.spec, sort_keys=False))
            self.loading.set_visibility(False)
            self.content.set_visibility(True)
        is_turn_of_log = self.polls % 2 == 0  # the log's and the events' turns alternate
        events = await self._read_events(job) if is_new or has_ended or not is_turn_of_log else []
        await self._tell_state(job)
        if self.has_started and (is_changed or events):
            await self.training.refresh(self.api, job, whole=has_ended)
            await self._read_statistics(job)
            await self._read_anatomy(job)
            self._mark(events)
        if has_ended or is_turn_of_log:
            await self.log.refresh(job)
        self.polls += 1
        self.job = job

    async def _tell_state(self, job: Job) -> None:
        """Says what went wrong, and in which stage the job is."""
        await self.trouble.refresh(self.api, job)
        self.timeline.show(job)
        self.sections.show("Log", is_needed=job.status.attempt > 0)

    async def _read_events(self, job: Job) -> list[Event]:
        """Returns what happened since the last time, if anything did."""
        if job.resource_version == self.told_version:
            return []
        read = self._newest_events if self.told_version is None else self._new_events
        events = await read(job.metrics)
        self.told_version = job.resource_version
        self.timeline.add(events)
        starts = [event for event in events if event.kind == "started"]
        if starts:
            self._start(job, starts[-1])
        if any(event.kind == "checkpoint" for event in events):
            await self.checkpoints.refresh(job)
        return events

    def _start(self, job: Job, event: Event) -> None:
        """Takes what the workers tell at their start."""
        self.has_started, self.told_until = True, 0
        self.heat_map.num_rows = num_statistics = len(event.data["statistics"])
        self._show_sections(num_statistics)
        self.training.started(event)
        self.environment.show(job, event)
        self.fallback.show(event.data.get("plain_parameters", {}))

    async def _newest_events(self, metrics: Sequence[Metric]) -> list[Event]:
        """Returns the newest events, and those that the charts mark however many came after them."""
        told = (await self.api.events(self.job_id, limit=MOST_EVENTS, newest_of=TOLD)).events
        found = {event.id: event for event in told}
        for kinds in (*([kind] for kind in MARKED), KINDS):
            page = await self.api.events(self.job_id, limit=MOST_MARKS // 2, newest_of=kinds)
            found |= {event.id: event for event in page.events}
        self.event_panel.add(told, metrics)
        self.next_after = told[-1].id if told else 0
        return [event for _, event in sorted(found.items())]

    async def _new_events(self, metrics: Sequence[Metric]) -> list[Event]:
        page = await self.api.events(self.job_id, after=self.next_after, limit=MOST_EVENTS, newest_of=TOLD)
        self.next_after = page.next_after
        self.event_panel.add(page.events, metrics)
        for event in page.events:
            if event.kind == "started":
                self.training.redo(event.data["resumed_step"])
                self.heat_map.cut(event.data["resumed_step"])
        return page.events

    def _mark(self, events: Sequence[Event]) -> None:
        new, self.attempt = marks(events, self.attempt)
        if new:
            self.training.mark(new)
            self.legend.set_visibility(True)

    async def _read_statistics(self, job: Job) -> None:
        step = job.status.progress.step
        if self.heat_map.num_rows and step:
            await self.heat_map.refresh(self.api, self.job_id, step, whole=job.status.is_terminal)

    async def _read_anatomy(self, job: Job) -> None:
        """Reads what is told every few seconds, about as often."""
        is_whole = job.status.is_terminal or self.told_until == 0
        if job.status.progress.step == 0 or not (is_whole or self.polls % POLLS_PER_ANATOMY == 0):
            return
        told = await self.api.anatomy(self.job_id, from_step=0 if is_whole else self.told_until)
        self.told_until = told.last_step
        for place in (self.layers, self.inversions, self.phases_by_rank, self.workers):
            place.show(told)
        self.spectra.add(told)

    async def refine(self, window: Sequence[int] | None) -> None:
        """Shows the steps that the reader has zoomed to as finely as the screen does."""
        async with self.reading:
            try:
                await self.training.refine(self.api, self.job_id, None if window is None else (window[0], window[1]))
                await self.heat_map.refine(self.api, self.job_id)
            except ServiceError as error:
                self.freshness.stale(str(error))

    async def _recolour(self) -> None:
        async with self.reading:
            try:
                if self.job is not None:
                    await self._read_statistics(self.job)
            except ServiceError as error:
                self.freshness.stale(str(error))

    async def _cancel(self) -> None:
        try:
            await self.api.cancel(self.job_id)
        except ServiceError as error:
            ui.notify(f"The job was not cancelled: {error}", type="negative")
        await self.refresh()

    def _rest(self) -> None:
        self.is_complete = True
        self.timer.interval = CLOCK_S
