"""The page that submits a job: one spec, as text and as a form, with its problems, its code and its plan beside it."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from fastapi import Request, Response
from nicegui import ui
from nicegui.events import ValueChangeEventArguments

from ngd_service.client.client import (
    AsyncClient,
    InvalidRequestError,
    NotFoundError,
    ServiceError,
    UnauthorizedError,
)
from ngd_service.client.spec_text import lines_of, read, with_setting, without_setting
from ngd_service.dashboard.code_panel import CodePanel
from ngd_service.dashboard.origin import RECIPES, recipe, start
from ngd_service.dashboard.plain import unknown_jobs_page
from ngd_service.dashboard.plan_panel import PlanPanel
from ngd_service.dashboard.problems import ProblemList
from ngd_service.dashboard.spec_form import SpecForm, foreign
from ngd_service.dashboard.theme import RECONNECT_S, page_frame, panel, reader
from ngd_service.resources import ProblemItem

__all__ = ["register"]

STYLE = Path(__file__).with_name("submit.css")
# The editor has no label of its own, and no colours that follow the page's.
FIT_EDITOR = """getElement(ID).editorPromise.then(() => {
  const body = document.body, tell = () => emitEvent('dark', body.classList.contains('body--dark'));
  document.querySelector('.editor .cm-content').setAttribute('aria-label', 'Job file');
  new MutationObserver(tell).observe(body, {attributeFilter: ['class']});
  tell();
})"""
QUIET_S = 0.4  # after the last key before the service is asked
NO_NAME = "Start from ..."


def register(api_of: Callable[[Request], AsyncClient]) -> None:
    """Serves the page at /submit, reading through what `api_of` gives its reader."""

    @ui.page("/submit", reconnect_timeout=RECONNECT_S)
    async def submit(request: Request, clone: str = "", fork: str = "") -> Response | None:
        api, (job_id, _, step) = api_of(request), (fork or clone).partition("@")
        try:
            job = await api.get(job_id) if job_id else None
        except NotFoundError:
            return unknown_jobs_page([job_id])
        ui.add_css(STYLE)
        with page_frame("Submit a job", reader(request)):
            text, said = start(job, is_fork=bool(fork), step=int(step) if step.isdecimal() else None)
            page = SubmitPage(api, text, said)
        ui.timer(0, page.begin, once=True)
        return None


class SubmitPage:
    """The text is the spec; the form shows what it holds, and changes it."""

    def __init__(self, api: AsyncClient, text: str, origin: str) -> None:
        self.api = api
        self.text = text
        self.spec: dict[str, Any] = {}
        self.key = str(uuid4())  # of what the text says now: however often it is sent, it makes one job
        self.is_sending = False
        self._lay_out_heading()
        if origin:
            with ui.element("div").classes("panel notice waits"):
                ui.icon("call_split").props("aria-hidden=true")
                ui.label(origin).classes("notice-text")
        self.problems = ProblemList()
        with ui.element("div").classes("grid submit"):
            with panel("Settings"), ui.element("div").classes("panel-body"):
                self.form = SpecForm(self._set)
            with ui.element("div").classes("column-of-panels"):
                with panel("Job file"):
                    ui.label("YAML or JSON; every setting of a job is taken here").classes("panel-note")
                    with ui.element("div").classes("panel-body"):
                        self._lay_out_editor()
                self.code = CodePanel(api, self._code, self._use_code)
                self.plan = PlanPanel(api)

    def _lay_out_heading(self) -> None:
        with ui.element("div").classes("heading"):
            with ui.element("h1"):
                ui.label("Submit a job")
            ui.element("div").classes("spread")
            names = sorted(Path(file.name).stem for file in RECIPES.iterdir() if file.name.endswith(".yaml"))
            recipes = ui.select({"": NO_NAME} | {name: name for name in names}, value="", on_change=self._start_from)
            recipes.props('dense outlined options-dense aria-label="Start from a recipe"').classes("recipes")
            self.send = ui.button("Submit", icon="send", on_click=self._send).props("unelevated no-caps")

    def _lay_out_editor(self) -> None:
        self.editor = ui.codemirror(self.text, language="YAML", indent="  ", line_wrapping=True, on_change=self._typed)
        self.editor.classes("editor")
        ui.on("dark", lambda event: self.editor.set_theme("githubDark" if event.args else "githubLight"))

    async def begin(self) -> None:
        """Shows the first text once the browser is there."""
        ui.run_javascript(FIT_EDITOR.replace("ID", str(self.editor.id)))
        await self._check()

    async def _typed(self, event: ValueChangeEventArguments[Any]) -> None:
        if event.value == self.text:
            return
        self._take(str(event.value))
        text = self.text
        await asyncio.sleep(QUIET_S)
        if text == self.text:
            await self._check()

    async def _set(self, path: Sequence[str], value: object) -> None:
        """Takes a change that the form has made."""
        try:
            text = self.text
            if path[-1] == "kind" and value is not None:
                for other in foreign(self.spec, path[:-1], str(value)):
                    text = without_setting(text, other)
            text = without_setting(text, path) if value is None else with_setting(text, path, value)
        except ValueError as error:
            self.problems.show([ProblemItem(pointer="", code="no_yaml", detail=f"the job is {error}")], {})
            return
        await self._replace(text)

    async def _replace(self, text: str) -> None:
        self._take(text)
        self.editor.set_value(text)
        await self._check()

    def _take(self, text: str) -> None:
        self.text, self.key = text, str(uuid4())

    async def _check(self) -> None:
        """Asks the service what is wrong with the text, and shows it; then what the job will cost."""
        text = self.text
        try:
            spec = read(text)
        except ValueError:
            spec = None  # the service words it
        if isinstance(spec, dict):
            self.spec = spec
            self.form.show(spec)
            self.code.show()
        problems = await self._problems_of(text)
        if text != self.text:
            return
        self._show(problems)
        if not problems and isinstance(spec, dict):
            await self.plan.show(spec)
        else:
            await self.plan.show(None)

    async def _problems_of(self, text: str) -> list[ProblemItem]:
        """Returns what the service finds wrong, or why it could not be asked."""
        try:
            await self.api.validate(text)
        except InvalidRequestError as error:
            return _items(error)
        except ServiceError as error:
            return [_trouble(error)]
        return []

    def _show(self, problems: Sequence[ProblemItem]) -> None:
        try:
            lines = lines_of(self.text)
        except ValueError:
            lines = {}
        self.form.tell(problems)
        self.problems.show(problems, lines)

    async def _send(self) -> None:
        if self.is_sending:
            return
        self.is_sending = True
        self.send.disable()
        try:
            job = await self.api.submit(self.text, idempotency_key=self.key)
        except InvalidRequestError as error:
            self._show(_items(error))
        except ServiceError as error:
            self._show([_trouble(error)])
        else:
            ui.navigate.to(f"/jobs/{job.id}")
            return
        self.is_sending = False
        self.send.enable()

    async def _start_from(self, event: ValueChangeEventArguments[Any]) -> None:
        if event.value:
            await self._replace(recipe(str(event.value)))

    def _code(self) -> dict[str, Any]:
        code = self.spec.get("code")
        return code if isinstance(code, dict) else {}

    async def _use_code(self, sha256: str) -> None:
        await self._replace(with_setting(self.text, ["code", "sha256"], sha256))


def _trouble(error: ServiceError) -> ProblemItem:
    """Returns why the service does not take the job, whatever is in it. The text stays on the page."""
    is_out = isinstance(error, UnauthorizedError)
    hint = "copy the job file, then load the page again to log in" if is_out else None
    return ProblemItem(pointer="", code="not_taken", detail=str(error), hint=hint)


def _items(error: InvalidRequestError) -> list[ProblemItem]:
    problem = error.problem
    return problem.errors or [ProblemItem(pointer="", code=problem.code, detail=problem.detail)]
