"""The checkpoints that a job keeps: why, how good the model is there, its files, and the way to fork a job there."""

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from nicegui import ui
from nicegui.events import GenericEventArguments

from ngd_service.client.client import AsyncClient, ServiceError
from ngd_service.client.downloads import CARD, card_of
from ngd_service.client.scores import listed
from ngd_service.client.units import binary_bytes, counted
from ngd_service.dashboard.origin import fork_address
from ngd_service.dashboard.theme import panel
from ngd_service.resources import Checkpoint, Job, Metric
from ngd_workers.contract.checkpoint_files import WEIGHTS

__all__ = ["CheckpointPanel"]

COLUMNS = [
    {"name": name, "label": label, "field": name, "align": align}
    for name, label, align in (
        ("step", "step", "right"),
        ("kept", "kept as", "left"),
        ("size", "size", "right"),
        ("test", "on the test data", "left"),
        ("attempt", "attempt", "right"),
        ("files", "files", "left"),
        ("act", "", "right"),
    )
]
STEP = '<q-td :props="props">{{ props.row.step.toLocaleString("en") }}</q-td>'
KEPT = '<q-td :props="props"><b v-for="why in props.row.kept" :class="why">{{ why }}</b></q-td>'
FILES = """<q-td :props="props" class="files"><a v-if="props.row.weights" :href="props.row.weights" download
title="The model's weights: safetensors">Weights</a>
<a v-if="props.row.weights" href="#" role="button" title="The origin of the weights: the job's spec, versions, metrics"
@click.prevent="$parent.$emit('card', props.row.step)">Card</a>
<a v-for="file in props.row.files" :href="file.url" :download="file.name" :title="file.size">{{ file.name }}</a>
</q-td>"""
ACT = """<q-td :props="props"><q-btn flat dense no-caps class="plain" :icon="props.row.is_pinned ? 'lock' : 'lock_open'"
:label="props.row.is_pinned ? 'Unpin' : 'Pin'" :title="props.row.is_pinned ? 'Let it go when newer ones come'
: 'Keep it, however many come after it'" @click="$parent.$emit('pin', [props.row.step, !props.row.is_pinned])" />
<a class="tool-link" :href="props.row.fork" title="Submit a job that goes on from here">Fork</a></q-td>"""


class CheckpointPanel:
    """A table of them, newest first."""

    def __init__(self, api: AsyncClient) -> None:
        self.api = api
        self.job: Job | None = None
        self.known: list[Checkpoint] = []
        with panel("Checkpoints", "wide"):
            self.whole = ui.context.slot.parent
            self.note = ui.label("None saved yet").classes("panel-note digits")
            with ui.element("div").classes("panel-body"):
                self.table = ui.table(rows=[], columns=COLUMNS, row_key="step", pagination=10).classes("dense fill")
        self.table.props('flat dense aria-label="Checkpoints"').classes("checkpoints").set_visibility(False)
        for name, template in (("step", STEP), ("kept", KEPT), ("files", FILES), ("act", ACT)):
            self.table.add_slot(f"body-cell-{name}", template)
        self.table.on("pin", self._pin)
        self.table.on("card", self._save_card)

    async def refresh(self, job: Job) -> None:
        """Reads the list again."""
        self.job = job
        try:
            self.known = await self.api.checkpoints(job.id)
        except ServiceError as error:
            self.note.set_text(f"The list can't be read: {error}")
            return
        total = binary_bytes(sum(one.bytes for one in self.known))
        self.note.set_text(
            f"{counted(len(self.known), 'checkpoint')} kept, {total}" if self.known else "None saved yet"
        )
        rows = [row(job, one, job.metrics, is_newest=not i) for i, one in enumerate(self.known)]
        if rows != self.table.rows:  # the table goes over the socket with all of its templates
            self.table.rows = rows
            self.table.props["hide-pagination"] = len(rows) <= 10
            self.table.set_visibility(bool(rows))

    async def _pin(self, event: GenericEventArguments) -> None:
        step, is_wanted = event.args
        assert self.job is not None
        try:
            await (self.api.pin if is_wanted else self.api.unpin)(self.job.id, step)
        except ServiceError as error:
            ui.notify(f"Step {step:,} was not {'pinned' if is_wanted else 'unpinned'}: {error}", type="negative")
        await self.refresh(self.job)

    async def _save_card(self, event: GenericEventArguments) -> None:
        """Gives the card that `ngd download` writes beside the weights."""
        assert self.job is not None
        checkpoint = next((one for one in self.known if one.step == event.args), None)
        if checkpoint is None:
            return
        try:
            starts = (await self.api.events(self.job.id, newest_of=["started"])).events
        except ServiceError as error:
            ui.notify(f"The card can't be written: {error}", type="negative")
            return
        card = card_of(self.job, checkpoint, starts[-1].data if starts else None)
        ui.download.content(json.dumps(card, indent=2) + "\n", CARD, "application/json")


def row(job: Job, one: Checkpoint, metrics: Sequence[Metric], *, is_newest: bool) -> dict[str, Any]:
    """Returns a checkpoint as the table's templates read it."""
    why = {"newest": is_newest, "best": one.is_best, "pinned": one.is_pinned}
    return {
        "step": one.step,
        "kept": [name for name, is_so in why.items() if is_so],
        "is_pinned": one.is_pinned,
        "size": binary_bytes(one.bytes),
        "test": listed(metrics, one.metrics) if one.metrics else "not tested here",
        "attempt": one.attempt,
        "weights": _address(job.id, one, WEIGHTS) if WEIGHTS in one.files else None,
        "files": [
            {"name": name, "url": _address(job.id, one, name), "size": binary_bytes(file.bytes)}
            for name, file in one.files.items()
            if name != WEIGHTS
        ],
        "fork": fork_address(job.id, one.step),
    }


def _address(job_id: str, one: Checkpoint, name: str) -> str:
    return f"/api/v1/jobs/{quote(job_id)}/checkpoints/{one.step}/files/{quote(name, safe='')}"
