"""The checkpoints that a job keeps: where they are, how good the model is there, and their files to download."""

import html
from collections.abc import Sequence
from urllib.parse import quote

from nicegui import ui

from ngd_service.client.client import AsyncClient, ServiceError
from ngd_service.client.scores import listed
from ngd_service.client.units import binary_bytes, counted
from ngd_service.dashboard.theme import panel
from ngd_service.resources import Checkpoint, Job, Metric

__all__ = ["CheckpointPanel"]

HEAD = "<tr><th>step<th class=right>size<th>on the test data<th class=right>attempt<th>files</tr>"


class CheckpointPanel:
    """A table of them, newest first."""

    def __init__(self) -> None:
        with panel("Checkpoints", "wide"):
            self.whole = ui.context.slot.parent
            self.note = ui.label("None saved yet").classes("panel-note digits")
            with ui.element("div").classes("panel-body"):
                self.table = ui.html("", sanitize=False).classes("plain-table")

    async def refresh(self, api: AsyncClient, job: Job) -> None:
        """Reads the list again."""
        try:
            known = await api.checkpoints(job.id)
        except ServiceError as error:
            self.note.set_text(f"The list can't be read: {error}")
            return
        total = binary_bytes(sum(one.bytes for one in known))
        self.note.set_text(f"{counted(len(known), 'checkpoint')} kept, {total}" if known else "None saved yet")
        rows = "".join(_row(job.id, one, job.metrics) for one in known)
        self.table.set_content(f"<table>{HEAD}{rows}</table>" if known else "")


def _row(job_id: str, one: Checkpoint, metrics: Sequence[Metric]) -> str:
    best = " <b class=best>best</b>" if one.is_best else ""
    scores = html.escape(listed(metrics, one.metrics)) if one.metrics else "not tested here"
    files = " ".join(_file(job_id, one, name) for name in one.files)
    return (
        f"<tr><td class=digits>{one.step:,}{best}<td class='digits right'>{binary_bytes(one.bytes)}"
        f"<td>{scores}<td class='digits right'>{one.attempt}<td class=files>{files}</tr>"
    )


def _file(job_id: str, one: Checkpoint, name: str) -> str:
    path = f"/api/v1/jobs/{quote(job_id)}/checkpoints/{one.step}/files/{quote(name, safe='')}"
    size = binary_bytes(one.files[name].bytes)
    return f'<a href="{path}" download="{html.escape(name)}" title="{size}">{html.escape(name)}</a>'
