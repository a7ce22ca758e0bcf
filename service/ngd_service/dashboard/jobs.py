"""The page of all jobs: those that run, those that wait, those that have ended; found, sorted and marked to compare."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fastapi import Request
from nicegui import ui
from nicegui.events import TableSelectionEventArguments

from ngd_service.client.client import AsyncClient, InvalidRequestError, ServiceError, UnauthorizedError
from ngd_service.client.comparison import address
from ngd_service.client.scores import result
from ngd_service.client.units import NOTHING, counted, duration, number, seconds
from ngd_service.dashboard.filters import FilterRow, Filters
from ngd_service.dashboard.origin import clone_address
from ngd_service.dashboard.summary import steps
from ngd_service.dashboard.theme import PHASE_ICONS, RECONNECT_S, Freshness, ask_to_log_in, empty, page_frame, reader
from ngd_service.resources import Job, JobPage

__all__ = ["register", "row"]

POLL_S = 1.0
PAGE_SIZE = 50
WIDE_PX = 1200  # of a window in which all columns have room
COLUMNS = [
    {"name": name, "label": label, "field": name, "align": align}
    for name, label, align in (
        ("phase", "Phase", "left"),
        ("name", "Job", "left"),
        ("optimizer", "Optimizer", "left"),
        ("lr", "Learning rate", "right"),
        ("progress", "Progress", "left"),
        ("result", "Result", "right"),
        ("target_step", "Steps to target", "right"),
        ("target_s", "Seconds to target", "right"),
        ("time", "Time", "right"),
        ("created", "Submitted", "right"),
    )
]
FEW_COLUMNS = ["phase", "name", "optimizer", "progress", "result", "target_step", "target_s"]
MARK = """<q-checkbox dense v-model="props.selected" :aria-label="'Mark ' + props.row.name" />"""
ALL = """<q-checkbox dense v-model="props.selected" aria-label="Mark all of this page" />"""
PHASE = """<span :class="'phase ' + props.row.phase"><q-icon :name="props.row.icon" aria-hidden="true" />
{{ props.row.word }}</span>"""
NAME = """<a class="job-name" data-row :href="'/jobs/' + props.row.id">{{ props.row.name }}</a>"""
WHY = """<div v-if="props.row.why" class="job-why">{{ props.row.why }}</div>"""
PROGRESS = """<div class="job-progress"><div class="track" role="progressbar" aria-valuemin="0" aria-valuemax="100"
:aria-valuenow="Math.round(100 * props.row.share)" :aria-label="'progress of ' + props.row.name">
<div :class="props.row.phase" :style="{width: 100 * props.row.share + '%'}"></div></div>
<span class="muted digits">{{ props.row.steps }}</span></div>"""
CREATED = """<reader-time ago :datetime="props.row.created"></reader-time>"""
CARD = f"""<div class="job-card"><div><span class="job-mark">{MARK}{NAME}</span>{PHASE}</div>{WHY}{PROGRESS}
<div class="muted digits job-facts"><span>{{{{ props.row.optimizer }}}}, lr {{{{ props.row.lr }}}}</span>
<span>{{{{ props.row.result }}}}</span><span v-if="props.row.reached">target after {{{{ props.row.reached }}}}</span>
<span>{CREATED}</span></div></div>"""
CHANGE = (
    "(rows => {changed}.forEach(row => Object.assign(rows.find(old => old.id === row.id) ?? {{}}, row)))"
    "(getElement({id}).$attrs.rows)"
)
FIRST_JOB = "ngd submit workers/ngd_workers/recipes/digits.yaml --follow"


def register(api_of: Callable[[Request], AsyncClient]) -> None:
    """Serves the page at /, reading through what `api_of` gives its reader."""

    @ui.page("/", reconnect_timeout=RECONNECT_S)
    async def jobs(request: Request) -> None:
        query = request.query_params
        selected = dict.fromkeys(filter(None, query.get("selected", "").split(",")))
        with page_frame("Jobs", reader(request)) as freshness:
            page = JobsPage(api_of(request), Filters.of(query), tuple(selected), freshness)
        timer = ui.timer(POLL_S, page.refresh)
        ui.on("visible", lambda event: setattr(timer, "active", event.args))


class JobsPage:
    """The list, its empty and loading states, and which of its jobs are marked."""

    def __init__(self, api: AsyncClient, filters: Filters, selected: tuple[str, ...], freshness: Freshness) -> None:
        self.api = api
        self.filters = filters
        self.selected = selected
        self.freshness = freshness
        self.rows: list[dict[str, Any]] = []  # as the browser has them
        self._lay_out_heading()
        FilterRow(filters, self._choose)
        self.loading = ui.skeleton().style("height: 220px; width: 100%").props('aria-label="Loading the jobs"')
        self.empty = empty(
            "science",
            "No jobs yet",
            "A job is a YAML file: a model, data, an optimizer and a schedule. Submit the first one here, or from a "
            "terminal.",
            FIRST_JOB,
        )
        self.nothing = empty("filter_alt_off", "No job passes these filters", "Take one of them away, or all of them.")
        with self.nothing:
            ui.link("All jobs", "/")
        with ui.element("div").classes("panel notice").props("role=alert") as self.notice:
            ui.icon("error").props("aria-hidden=true")
            self.refused = ui.label().classes("notice-text")
            ui.link("All jobs", "/")
        self._lay_out_table()
        with ui.element("nav").classes("pages").props("aria-label=Pages"):
            self.first = ui.link("First page", replace(filters, page="").address(selected)).classes("button-link")
            self.next = ui.link("Next page", "/").classes("button-link")
        self._arrange(loading=True)

    def _lay_out_heading(self) -> None:
        with ui.element("div").classes("heading"):
            with ui.element("h1"):
                ui.label("Jobs")
            ui.element("div").classes("spread")
            self.hint = ui.label().classes("muted")
            self.clone = ui.button("Clone", icon="content_copy", on_click=self._clone).props("outline no-caps")
            self.compare = ui.button("Compare", icon="compare_arrows", on_click=self._compare)
            self.compare.props("unelevated no-caps data-key=c aria-keyshortcuts=c")
            self.cancel = ui.button("Cancel", icon="stop_circle", on_click=self._ask)
            self.cancel.props("outline no-caps color=negative")
            ui.link("Submit a job", "/submit").classes("button-link").props("data-key=n aria-keyshortcuts=n")
        with ui.dialog() as self.dialog, ui.card().classes("dialog"):
            with ui.element("h2"):
                self.question = ui.label()
            ui.label("Their workers stop after the step they are in. What they have learned so far stays here.")
            with ui.row().classes("fill justify-end"):
                ui.button("Keep them running", on_click=self.dialog.close).props("flat no-caps autofocus")
                ui.button("Cancel jobs", on_click=self._cancel).props("unelevated no-caps color=negative")

    def _lay_out_table(self) -> None:
        self.table = ui.table(
            rows=[], columns=COLUMNS, row_key="id", pagination=0, selection="multiple", on_select=self._on_select
        ).classes("panel jobs")
        self.table.props(
            'flat hide-pagination hide-selected-banner :grid="Quasar.Screen.lt.md" aria-label="Jobs" '
            f':visible-columns="Quasar.Screen.width < {WIDE_PX} ? {json.dumps(FEW_COLUMNS).replace(chr(34), chr(39))} '
            ': undefined"'
        )
        self.table.add_slot("header-selection", ALL)
        self.table.add_slot("body-selection", MARK)
        for name, template in (("phase", PHASE), ("name", NAME + WHY), ("progress", PROGRESS), ("created", CREATED)):
            self.table.add_slot(f"body-cell-{name}", f'<q-td :props="props">{template}</q-td>')
        self.table.add_slot("item", CARD)

    async def refresh(self) -> None:
        """Brings the list up to date."""
        wanted = self.filters
        try:
            listed = await self._read(wanted)
        except UnauthorizedError:
            ask_to_log_in()
        except InvalidRequestError as error:
            self.refused.set_text(str(error))
            self.rows = []
            self._arrange(loading=False, is_refused=True)
            self.freshness.ended("The service does not take these filters")
        except ServiceError as error:
            self.freshness.stale(str(error))
        else:
            if wanted == self.filters:  # else the reader has chosen others meanwhile
                self._show([row(job) for job in listed.jobs])
                self.next.props["href"] = replace(wanted, page=listed.next_page_token).address(self.selected)
                self._arrange(loading=False, has_more=bool(listed.next_page_token))
                self.freshness.live()

    async def _read(self, wanted: Filters) -> JobPage:
        given = {name: value for name, value in wanted.given().items() if name not in ("page", "order_by")}
        return await self.api.list_jobs(
            page_size=PAGE_SIZE, page_token=wanted.page or None, order_by=wanted.order_by, **given
        )

    def _show(self, rows: list[dict[str, Any]]) -> None:
        """Sends the table whole where jobs have come or gone, else what has changed in its rows."""
        if [new["id"] for new in rows] != [old["id"] for old in self.rows]:
            self.table.rows = rows
            self.table.selected = [one for one in rows if one["id"] in self.selected]
        else:
            pairs = zip(rows, self.rows, strict=True)
            changed = [{"id": new["id"], **dict(new.items() - old.items())} for new, old in pairs if new != old]
            if changed:
                self.table.client.run_javascript(CHANGE.format(changed=json.dumps(changed), id=self.table.id))
        self.rows = rows

    async def _choose(self, filters: Filters) -> None:
        self.filters = filters
        self._remember()
        await self.refresh()

    def _on_select(self, event: TableSelectionEventArguments) -> None:
        here = {one["id"] for one in self.rows}
        elsewhere = [job_id for job_id in self.selected if job_id not in here]
        self.selected = (*elsewhere, *(one["id"] for one in event.selection))
        self._remember()
        self._arrange(loading=False, has_more=self.next.visible)

    def _remember(self) -> None:
        ui.navigate.history.replace(self.filters.address(self.selected))

    def _compare(self) -> None:
        if len(self.selected) > 1:
            ui.navigate.to(address("", self.selected))

    def _clone(self) -> None:
        ui.navigate.to(clone_address(*self.selected))

    def _ask(self) -> None:
        self.dialog.open()

    async def _cancel(self) -> None:
        self.dialog.close()
        for job_id in self.selected:
            try:
                await self.api.cancel(job_id)
            except ServiceError as error:
                ui.notify(f"{job_id} was not cancelled: {error}", type="negative")
        await self.refresh()

    def _arrange(self, *, loading: bool, has_more: bool = False, is_refused: bool = False) -> None:
        num, is_bare = len(self.selected), not loading and not self.rows and not is_refused
        self.loading.set_visibility(loading)
        self.notice.set_visibility(is_refused)
        is_filtered = self.filters.are_any or bool(self.filters.page)
        self.empty.set_visibility(is_bare and not is_filtered)
        self.nothing.set_visibility(is_bare and is_filtered)
        self.table.set_visibility(bool(self.rows))
        self.first.set_visibility(bool(self.filters.page))
        self.next.set_visibility(has_more)
        self.hint.set_text({0: "", 1: "Mark another job to compare"}.get(num, f"{num} marked"))
        self.compare.set_visibility(num > 1)
        self.clone.set_visibility(num == 1)
        self.cancel.set_visibility(any(one["id"] in self.selected and not one["has_ended"] for one in self.rows))
        self.question.set_text(f"Cancel {counted(num, 'job')}?")


def row(job: Job) -> dict[str, Any]:
    """A job as the list's templates read it."""
    status, progress = job.status, job.status.progress
    total = progress.total_steps
    optimizer = job.spec.get("optimizer") or {}
    step, time_s = progress.target_step, progress.target_s
    reached = [] if step is None else [counted(step, "step"), *([] if time_s is None else [seconds(time_s)])]
    return {
        "id": job.id,
        "name": job.name,
        "phase": status.phase,
        "word": status.phase.capitalize(),
        "icon": PHASE_ICONS.get(status.phase, "help"),
        "has_ended": status.is_terminal,
        "why": _why(job),
        "optimizer": optimizer.get("kind", "own loop"),
        "lr": number(optimizer.get("lr")),
        "share": min(1.0, progress.step / total) if total else 0.0,
        "steps": steps(job),
        "result": result(job) or NOTHING,
        "target_step": NOTHING if step is None else f"{step:,}",
        "target_s": NOTHING if time_s is None else seconds(time_s),
        "reached": ", ".join(reached),
        "time": _time(job),
        "created": job.created_at.isoformat(),
    }


def _why(job: Job) -> str:
    """Returns what a job waits for, or why it has ended."""
    status = job.status
    if status.phase == "SUCCEEDED":
        return ""
    words: Sequence[str | None] = (status.reason, status.message) if status.phase == "FAILED" else (status.message,)
    return ": ".join(filter(None, words))


def _time(job: Job) -> str:
    """Returns how long a job took, or how long it will."""
    if job.finished_at is not None:
        took = None if job.started_at is None else (job.finished_at - job.started_at).total_seconds()
        return duration(took)
    eta_s = job.status.progress.eta_s
    return NOTHING if eta_s is None or job.status.is_terminal else f"{duration(eta_s)} left"
