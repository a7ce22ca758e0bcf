"""The plan of a job that is about to be submitted: its steps, seconds, memory and bytes, as `ngd plan` counts them."""

import json
from collections.abc import Mapping
from typing import Any

from nicegui import ui
from nicegui.events import UploadEventArguments

from ngd_dist.cost.cluster import PRESETS
from ngd_dist.cost.plan import Plan
from ngd_service.client.client import AsyncClient, InvalidRequestError, ServiceError
from ngd_service.client.plan_view import plan_bytes, plan_seconds, plan_text
from ngd_service.dashboard.summary import Fact
from ngd_service.dashboard.theme import panel, pick_files

__all__ = ["PlanPanel"]

DEVICES = {"cpu": "CPU"} | {name: name.upper() for name in PRESETS if name != "cpu"}


class PlanPanel:
    """Plans the newest spec it was given, one at a time: a plan takes seconds where the model's card has to be made."""

    def __init__(self, api: AsyncClient) -> None:
        self.api = api
        self.spec: dict[str, Any] | None = None  # the newest valid one
        self.card: Any = None  # that the reader has given
        self.is_planning = False
        self.is_device_chosen = False
        with panel("Plan"):
            self.note = ui.label().classes("panel-note digits").props("role=status")
            with ui.element("div").classes("panel-body stack"):
                with ui.element("div").classes("controls plan-fields"):
                    self.device = ui.select(DEVICES, label="Device", value="cpu", on_change=self._choose)
                    self.device.props("dense outlined options-dense")
                    self.nodes = ui.number("Nodes", value=1, min=1, precision=0, on_change=self._again)
                    self.nodes.props("dense outlined debounce=400")
                    self.card_upload = ui.upload(auto_upload=True, on_upload=self._take_card).classes("hidden-upload")
                    self.give_card = ui.button("Give a card", icon="upload_file", color=None)
                    self.give_card.props("outline no-caps dense").classes("plain")
                    self.give_card.on("click", js_handler=pick_files(self.card_upload))
                self.give_card.set_visibility(False)
                with ui.element("div").classes("facts") as self.facts:
                    self.ranks, self.steps = Fact("Ranks"), Fact("Steps")
                    self.time, self.step = Fact("Time of the job"), Fact("Time of a step")
                    self.memory, self.sent = Fact("Memory of a rank"), Fact("Sent by a rank")
                with ui.element("details") as self.details:
                    with ui.element("summary"):
                        ui.label("The whole plan, and other choices")
                    with ui.element("pre").classes("code mono").props('tabindex=0 aria-label="The whole plan"'):
                        self.text = ui.label()
        self._arrange(has_plan=False)

    async def show(self, spec: Mapping[str, Any] | None) -> None:
        """Plans a spec; None: the job is not valid as it is, so that there is nothing to plan."""
        self.spec = None if spec is None else dict(spec)
        if self.spec is None:
            self.note.set_text("There is no plan until the job is right")
            self._arrange(has_plan=False)
            return
        if not self.is_device_chosen:
            has_gpus = bool((self.spec.get("resources") or {}).get("gpus_per_worker"))
            self.device.set_value("h100" if has_gpus else "cpu")
        await self._plan()

    async def _plan(self) -> None:
        if self.is_planning:
            return  # the plan under way is followed by one of the newest spec
        self.is_planning = True
        try:
            planned = None
            while self.spec is not None and planned != (wanted := self._request()):
                self.note.set_text("Planning ...")
                self.facts.classes(add="outdated")
                await self._show_plan(wanted)
                planned = wanted
        finally:
            self.is_planning = False

    async def _show_plan(self, wanted: dict[str, Any]) -> None:
        try:
            plan = await self.api.plan(wanted)
            if self.spec is None or wanted != self._request():
                return  # a plan of what was there before
        except InvalidRequestError as error:
            self._refuse(str(error), needs_card=any(item.pointer == "/card" for item in error.problem.errors))
        except ServiceError as error:
            self._refuse(str(error))
        else:
            self._fill(plan, str(wanted["job"].get("name")))

    def _request(self) -> dict[str, Any]:
        assert self.spec is not None
        workers = (self.spec.get("resources") or {}).get("workers", 1)
        nodes = max(1, int(self.nodes.value or 1))
        cluster = {"nodes": nodes, "devices_per_node": -(-workers // nodes), "device": self.device.value}
        return {"job": self.spec, "cluster": cluster, "card": self.card}

    def _fill(self, plan: Plan, name: str) -> None:
        step = plan.step
        self.note.set_text(plan.warnings[0] if plan.warnings else "Predicted from the model, before anything runs")
        self.note.classes(add="refusal" if plan.warnings else None, remove=None if plan.warnings else "refusal")
        self.ranks.show(f"{step.ranks:,}", f"{plan.device}, {plan.samples_per_rank:,} samples each")
        self.steps.show("unknown" if plan.steps is None else f"{plan.steps:,}", f"{plan.parameters:,} weights")
        self.time.show("unknown" if plan.job_seconds is None else plan_seconds(plan.job_seconds), "without start-up")
        self.step.show(plan_seconds(step.step_seconds), f"engine {step.engine}")
        fits = "fits" if step.fits else "does NOT fit"
        self.memory.show(plan_bytes(step.memory), f"of {plan.memory_gib:g} GiB: {fits}")
        self.sent.show(plan_bytes(sum(step.bytes_sent.values())), "each step")
        self.text.set_text(plan_text(plan, name))
        self._arrange(has_plan=True)

    def _refuse(self, why: str, *, needs_card: bool = False) -> None:
        self.note.set_text(why)
        self._arrange(has_plan=False)
        self.give_card.set_visibility(needs_card)

    def _arrange(self, *, has_plan: bool) -> None:
        self.facts.set_visibility(has_plan)
        self.facts.classes(remove="outdated")
        self.details.set_visibility(has_plan)

    async def _choose(self) -> None:
        self.is_device_chosen = True
        await self._again()

    async def _again(self) -> None:
        if self.spec is not None:
            await self._plan()

    async def _take_card(self, event: UploadEventArguments) -> None:
        try:
            self.card = json.loads(await event.file.text())
        except ValueError as error:
            self._refuse(
                f"{event.file.name} is no JSON: {error}; give what ngd plan --write-card wrote", needs_card=True
            )
        else:
            await self._again()
        self.card_upload.reset()
