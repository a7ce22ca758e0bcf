"""The page of all jobs: a table that fills live, newest first."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from fastapi import Request
from nicegui import ui

from ngd_service.client.client import AsyncClient, ServiceError, UnauthorizedError
from ngd_service.client.scores import result
from ngd_service.client.units import NOTHING, ago, duration, number
from ngd_service.dashboard.summary import steps
from ngd_service.dashboard.theme import PHASE_ICONS, RECONNECT_S, Freshness, ask_to_log_in, empty, page_frame, reader
from ngd_service.resources import Job

__all__ = ["register", "row"]

POLL_S = 1.0
PAGE_SIZE = 50
COLUMNS = [
    {"name": "phase", "label": "Phase", "field": "phase", "align": "left"},
    {"name": "name", "label": "Job", "field": "name", "align": "left"},
    {"name": "progress", "label": "Progress", "field": "share", "align": "left"},
    {"name": "loss", "label": "Loss", "field": "loss", "align": "right"},
    {"name": "result", "label": "Result", "field": "result", "align": "right"},
    {"name": "eta", "label": "Time left", "field": "eta", "align": "right"},
    {"name": "age", "label": "Submitted", "field": "age", "align": "right"},
]
PHASE = """<span :class="'phase ' + props.row.phase"><q-icon :name="props.row.icon" aria-hidden="true" />
{{ props.row.word }}</span>"""
NAME = """<a class="job-name" :href="'/jobs/' + props.row.id">{{ props.row.name }}</a>"""
PROGRESS = """<div class="job-progress"><div class="track" role="progressbar" aria-valuemin="0" aria-valuemax="100"
:aria-valuenow="Math.round(100 * props.row.share)" :aria-label="'progress of ' + props.row.name">
<div :class="props.row.phase" :style="{width: 100 * props.row.share + '%'}"></div></div>
<span class="muted digits">{{ props.row.steps }}</span></div>"""
CARD = f"""<div class="job-card"><div>{NAME}{PHASE}</div>{PROGRESS}
<div class="muted digits"><span>loss {{{{ props.row.loss }}}}</span><span>{{{{ props.row.result }}}}</span>
<span>{{{{ props.row.age }}}}</span></div></div>"""
CHANGE = (
    "(rows => {changed}.forEach(row => Object.assign(rows.find(old => old.id === row.id) ?? {{}}, row)))"
    "(getElement({id}).$attrs.rows)"
)
FIRST_JOB = "ngd submit workers/ngd_workers/recipes/digits.yaml --follow"


def register(api_of: Callable[[Request], AsyncClient]) -> None:
    """Serves the page at /, reading through what `api_of` gives its reader."""

    @ui.page("/", reconnect_timeout=RECONNECT_S)
    async def jobs(request: Request) -> None:
        with page_frame("Jobs", reader(request)) as freshness:
            page = JobsPage(api_of(request), freshness)
        timer = ui.timer(POLL_S, page.refresh)
        ui.on("visible", lambda event: setattr(timer, "active", event.args))


class JobsPage:
    """The table, its empty and loading states, and what is known of the jobs."""

    def __init__(self, api: AsyncClient, freshness: Freshness) -> None:
        self.api = api
        self.freshness = freshness
        self.num_shown = PAGE_SIZE
        self.rows: list[dict[str, Any]] = []  # as the browser has them
        with ui.element("div").classes("heading"), ui.element("h1"):
            ui.label("Jobs")
        self.loading = ui.skeleton().style("height: 220px; width: 100%").props('aria-label="Loading the jobs"')
        self.empty = empty(
            "science",
            "No jobs yet",
            "A job is a YAML file: a model, data, an optimizer and a schedule. Submit the first one from a terminal; "
            "it appears here as soon as it is accepted.",
            FIRST_JOB,
        )
        self.table = ui.table(rows=[], columns=COLUMNS, row_key="id", pagination=0).classes("panel")
        self.table.props('flat hide-pagination :grid="Quasar.Screen.lt.md" aria-label="Jobs"')
        for name, template in (("phase", PHASE), ("name", NAME), ("progress", PROGRESS)):
            self.table.add_slot(f"body-cell-{name}", f'<q-td :props="props">{template}</q-td>')
        self.table.add_slot("item", CARD)
        self.more = ui.button("Show older jobs", on_click=self._show_more).props("flat no-caps")
        self._arrange(loading=True)

    async def refresh(self) -> None:
        """Brings the table up to date."""
        try:
            jobs, has_more = await self._read()
        except UnauthorizedError:
            ask_to_log_in()
            return
        except ServiceError as error:
            self.freshness.stale(str(error))
            return
        self._show([row(job) for job in jobs])
        self.freshness.live()
        self._arrange(loading=False, has_more=has_more)

    def _show(self, rows: list[dict[str, Any]]) -> None:
        """Sends the table whole where jobs have come or gone, else what has changed in its rows."""
        if [new["id"] for new in rows] != [old["id"] for old in self.rows]:
            self.table.rows = rows
        else:
            pairs = zip(rows, self.rows, strict=True)
            changed = [{"id": new["id"], **dict(new.items() - old.items())} for new, old in pairs if new != old]
            if changed:
                self.table.client.run_javascript(CHANGE.format(changed=json.dumps(changed), id=self.table.id))
        self.rows = rows

    async def _read(self) -> tuple[list[Job], bool]:
        jobs: list[Job] = []
        token: str | None = None
        while True:
            page = await self.api.list_jobs(page_size=PAGE_SIZE, page_token=token)
            jobs += page.jobs
            token = page.next_page_token or None
            if token is None or len(jobs) >= self.num_shown:
                return jobs, token is not None

    async def _show_more(self) -> None:
        self.num_shown += PAGE_SIZE
        await self.refresh()

    def _arrange(self, *, loading: bool, has_more: bool = False) -> None:
        self.loading.set_visibility(loading)
        self.empty.set_visibility(not loading and not self.rows)
        self.table.set_visibility(bool(self.rows))
        self.more.set_visibility(has_more)


def row(job: Job, now: datetime | None = None) -> dict[str, Any]:
    """A job as the table's templates read it."""
    status, progress = job.status, job.status.progress
    total = progress.total_steps
    latest = job.metrics_latest
    return {
        "id": job.id,
        "name": job.name,
        "phase": status.phase,
        "word": status.phase.capitalize(),
        "icon": PHASE_ICONS.get(status.phase, "help"),
        "share": min(1.0, progress.step / total) if total else 0.0,
        "steps": steps(job),
        "loss": number(latest.get("loss")),
        "result": result(job) or NOTHING,
        "eta": duration(None if status.is_terminal else progress.eta_s),
        "age": ago(job.created_at, now or datetime.now(UTC)),
    }
