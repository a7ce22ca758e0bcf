"""The page of jobs side by side: who reached the target first, their curves over one another, what differs."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastapi import Request, Response
from nicegui import ui

from ngd_service.client.client import AsyncClient, ServiceError, UnauthorizedError
from ngd_service.client.comparison import Goal, goals, labels, results, settings, verdict
from ngd_service.client.units import NOTHING, counted, seconds
from ngd_service.dashboard.bars import Bars
from ngd_service.dashboard.curves import DASHES, SERIES_COLOURS, colour_of
from ngd_service.dashboard.measures import PLAIN, SHARE
from ngd_service.dashboard.overlay import AXES, MOST_SMOOTHING, Overlay, Run, View, connect
from ngd_service.dashboard.plain import unknown, unknown_jobs_page
from ngd_service.dashboard.theme import (
    RECONNECT_S,
    Freshness,
    ask_to_log_in,
    empty,
    page_frame,
    panel,
    phase_badge,
    reader,
)
from ngd_service.resources import Metric

__all__ = ["register"]

POLL_S = 1.0
MOST_JOBS = SERIES_COLOURS
SWATCH = (
    '<svg class="swatch" viewBox="0 0 26 8" aria-hidden="true"><line x1="0" y1="4" x2="26" y2="4" stroke="{colour}" '
    'stroke-width="3" stroke-dasharray="{dashes}"/></svg>'
)
ONE_RUN = "Each job is one run: with another seed the order may be another."


def register(api_of: Callable[[Request], AsyncClient]) -> None:
    """Serves the page at /compare?jobs=a,b, reading through what `api_of` gives its reader."""

    @ui.page("/compare", reconnect_timeout=RECONNECT_S)
    async def compare(request: Request) -> Response | None:
        ids = list(dict.fromkeys(filter(None, request.query_params.get("jobs", "").split(","))))
        api = api_of(request)
        strange = await unknown(api, ids[:MOST_JOBS])
        if strange:
            return unknown_jobs_page(strange)
        with page_frame("Compare jobs", reader(request)) as freshness:
            if len(ids) < 2:
                _ask_for_jobs(ids)
                freshness.ended()
                return None
            page = ComparePage(api, ids, View.of(request.query_params), freshness)
        timer = ui.timer(POLL_S, page.refresh)
        ui.on("visible", lambda event: setattr(timer, "active", event.args))
        return None


class ComparePage:
    """The panels of the page, and the jobs as they were read last."""

    def __init__(self, api: AsyncClient, ids: Sequence[str], view: View, freshness: Freshness) -> None:
        self.api = api
        self.ids = ids[:MOST_JOBS]
        self.view = view
        self.freshness = freshness
        self.reading = asyncio.Lock()
        self.client = ui.context.client
        self.runs: list[Run] = []
        self.charts: list[Overlay] = []
        self.bars: dict[Goal, tuple[ui.label, Bars, Bars]] = {}
        self.shown: dict[str, Any] = {}  # of the tables and badges, so that only changes are sent
        with ui.element("div").classes("heading"):
            with ui.element("h1"):
                ui.label("Compare jobs")
            ui.element("div").classes("spread")
            choose = ui.link(target=f"/?selected={','.join(self.ids)}").classes("button-link")
            with choose.props("data-key=c aria-keyshortcuts=c"):
                ui.label("Choose jobs")
        if len(ids) > MOST_JOBS:
            ui.label(f"The first {MOST_JOBS} of {len(ids)} jobs are shown.").classes("muted")
        self.loading = ui.skeleton().style("height: 220px; width: 100%").props('aria-label="Loading the jobs"')
        self.content = ui.element("div").classes("sections")

    async def refresh(self) -> None:
        """Brings the page up to date."""
        if not self.client.has_socket_connection or self.reading.locked():
            return
        async with self.reading:
            try:
                await self._read()
            except UnauthorizedError:
                ask_to_log_in()
            except ServiceError as error:
                self.freshness.stale(str(error))
            else:
                has_ended = all(run.job.status.is_terminal for run in self.runs)
                self.freshness.ended() if has_ended else self.freshness.live()

    async def _read(self) -> None:
        if not self.runs:
            jobs = await asyncio.gather(*(self.api.get(job_id) for job_id in self.ids))
            names = labels(jobs)
            self.runs = [Run(job, names[i], i) for i, job in enumerate(jobs)]
        shown = [metric.name for metric in _metrics(self.runs)]
        names_read = [*shown, *(f"test_{name}" for name in shown)]
        news = await asyncio.gather(*(run.refresh(self.api, names_read) for run in self.runs))
        if any(news):
            self._show()

    def _show(self) -> None:
        jobs, histories = [run.job for run in self.runs], [run.history for run in self.runs]
        wanted, metrics = goals(jobs), _metrics(self.runs)
        parts = (wanted, [metric.name for metric in metrics])
        if self._is_new("parts", parts):  # metrics and targets are known once the workers are up
            self._lay_out(wanted, metrics)
        for goal, (sentence, in_steps, in_seconds) in self.bars.items():
            sentence.set_text(verdict({run.label: (run.job, run.history) for run in self.runs}, goal))
            reached = {run.label: run.history.reached(goal) for run in self.runs}
            in_steps.draw({label: found and float(found[0]) for label, found in reached.items()})
            in_seconds.draw({label: found and found[1] for label, found in reached.items()})
        self._draw()
        if self._is_new("phases", [job.status.phase for job in jobs]):
            self._show_jobs()
        told = results(jobs, histories, wanted)
        if self._is_new("results", told):
            self.results.clear()
            with self.results:
                self._table(told | {"phase": [phase.capitalize() for phase in told["phase"]]})

    def _show_settings(self) -> None:
        """Shows the settings that all jobs have; below, folded, those that only some of their optimizers have."""
        differing = settings([run.job for run in self.runs])
        shared = {name: values for name, values in differing.items() if NOTHING not in values}
        self._table(shared)
        if len(shared) < len(differing):
            with ui.element("details"):
                with ui.element("summary"):
                    ui.label(f"{counted(len(differing) - len(shared), 'setting')} that not all of them have")
                self._table({name: values for name, values in differing.items() if name not in shared})

    def _is_new(self, name: str, value: Any) -> bool:
        was, self.shown[name] = self.shown.get(name), value
        return bool(was != value)

    def _draw(self) -> None:
        self.client.run_javascript("".join(chart.draw(self.view) for chart in self.charts))

    def _lay_out(self, wanted: Sequence[Goal], metrics: Sequence[Metric]) -> None:
        self.loading.set_visibility(False)
        self.content.clear()
        with self.content:
            self.list = ui.element("ul").classes("compared").props('aria-label="Compared jobs"')
            self._lay_out_verdicts(wanted)
            self._lay_out_controls()
            with ui.element("div").classes("grid"):
                self.charts = [chart for metric in metrics for chart in self._charts_of(metric, wanted)]
            with panel("Results"):
                self.results = ui.element("div").classes("panel-body scrolls")
            with panel("Settings that differ"), ui.element("div").classes("panel-body scrolls"):
                self._show_settings()
        self.shown = {"parts": self.shown["parts"]}
        self.client.run_javascript(connect(self.charts))

    def _charts_of(self, metric: Metric, wanted: Sequence[Goal]) -> list[Overlay]:
        unit = SHARE if metric.unit == "share" else PLAIN
        label, its = metric.label[:1].upper() + metric.label[1:], [one for one in wanted if one.metric == metric.name]
        return [
            Overlay(f"{label} in training", metric.name, unit, self.runs, []),
            Overlay(f"{label} on the test data", f"test_{metric.name}", unit, self.runs, its),
        ]

    def _lay_out_verdicts(self, wanted: Sequence[Goal]) -> None:
        self.bars = {}
        if not wanted:
            with ui.element("p").classes("muted verdict"):
                ui.label("None of these jobs has a target that was tested, so there are no steps to it to count.")
        for goal in wanted:
            with ui.element("p").classes("verdict"):
                sentence = ui.label().props("role=status")
                ui.label(ONE_RUN).classes("muted")
            with ui.element("div").classes("grid"):
                in_steps = Bars(
                    f"Steps to {goal.words}", "steps", lambda steps: counted(int(steps), "step"), len(self.ids)
                )
                in_seconds = Bars(
                    f"Seconds to {goal.words}", "seconds since the workers started", seconds, len(self.ids)
                )
            self.bars[goal] = sentence, in_steps, in_seconds

    def _lay_out_controls(self) -> None:
        view = self.view
        with ui.element("div").classes("controls").props('role=group aria-label="Curves"'):
            with ui.element("label"):
                ui.label("Horizontal axis")
                words = {"samples": "Samples", "step": "Steps", "epoch": "Epochs", "seconds": "Seconds"}
                axis = ui.select({by: words[by] for by in AXES}, value=view.x).props("dense outlined options-dense")
                axis.props('aria-label="Horizontal axis"').on_value_change(lambda event: self._choose(x=event.value))
            with ui.element("label").classes("slider"):
                ui.label("Smoothing")
                slider = ui.slider(min=0, max=MOST_SMOOTHING, step=0.02, value=view.smoothing).props("label")
                slider.props('aria-label="Smoothing: weight of the past" dense')
                slider.on("change", lambda event: self._choose(smoothing=float(event.args)))
            for name, label in (("x", "Logarithmic horizontal axis"), ("y", "Logarithmic vertical axis")):
                box = ui.checkbox(label, value=name in view.log).props("dense")
                box.on_value_change(lambda event, name=name: self._choose_log(name, is_log=event.value))

    def _choose_log(self, name: str, *, is_log: bool) -> None:
        self._choose(log="".join(one for one in "xy" if (is_log if one == name else one in self.view.log)))

    def _choose(self, **choice: Any) -> None:
        self.view = replace(self.view, **choice)
        ui.navigate.history.replace(f"/compare?jobs={','.join(self.ids)}{self.view.query()}")
        self._draw()

    def _show_jobs(self) -> None:
        self.list.clear()
        with self.list:
            for run in self.runs:
                with ui.element("li"):
                    _swatch(run.index)
                    ui.link(run.label, f"/jobs/{run.job.id}")
                    phase_badge(run.job.status.phase)
                    if len(self.runs) > 2:
                        others = ",".join(job_id for job_id in self.ids if job_id != run.job.id)
                        leave = ui.link(target=f"/compare?jobs={others}{self.view.query()}").classes("plain-link")
                        with leave.props(f'aria-label="Leave out {run.label}" title="Leave out"'):
                            ui.icon("close").props("aria-hidden=true")

    def _table(self, told: Mapping[str, Sequence[str]]) -> None:
        """Lays a table out: a row for each name, a column for each job."""
        with ui.element("table").classes("facts-table"):
            with ui.element("thead"), ui.element("tr"):
                ui.element("td")
                for run in self.runs:
                    with ui.element("th").props("scope=col"), ui.element("div"):
                        _swatch(run.index)
                        ui.label(run.label)
            with ui.element("tbody"):
                for name, values in told.items():
                    with ui.element("tr"):
                        with ui.element("th").props("scope=row"):
                            ui.label(name.replace(".", ".\u200b"))  # where a narrow column may break it
                        for value in values:
                            with ui.element("td"):
                                ui.label(value)


def _ask_for_jobs(ids: Sequence[str]) -> None:
    with empty("compare_arrows", "Choose two jobs to compare", "Mark them in the list of jobs, then press Compare."):
        ui.link("All jobs", f"/?selected={','.join(ids)}" if ids else "/")


def _metrics(runs: Sequence[Run]) -> list[Metric]:
    """Returns the loss, then each other metric that counts first for one of the jobs."""
    known = {metric.name: metric for run in runs for metric in run.job.metrics}
    first = [run.job.metrics[0].name for run in runs if run.job.metrics]
    return [known[name] for name in dict.fromkeys(["loss", *first]) if name in known]


def _swatch(index: int) -> None:
    dash = DASHES[index % len(DASHES)]
    dashes = "none" if isinstance(dash, str) else " ".join(map(str, dash))
    ui.html(SWATCH.format(colour=colour_of(index), dashes=dashes), sanitize=False)
