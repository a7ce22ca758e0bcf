"""What went wrong, first on the page: of each attempt that failed, the lines of the log around its last error."""

import html

from nicegui import ui

from ngd_service.client.client import AsyncClient, ServiceError
from ngd_service.client.units import counted
from ngd_service.dashboard.ansi import as_html
from ngd_service.dashboard.log_search import is_error
from ngd_service.resources import Job

__all__ = ["Trouble", "around_last_error", "failed_attempts"]

READ_LINES = 2_000
BEFORE, AFTER = 14, 3  # a traceback stands above its error
MOST_ATTEMPTS = 10  # shown; a job may have a thousand


class Trouble:
    """The newest failed attempt stands open while the job has failed or is tried again; the others open by a click."""

    def __init__(self) -> None:
        self.shown: dict[int, Attempt] = {}
        self.opened: list[int] = []  # the attempt that was opened for the reader
        with ui.element("div").classes("panel trouble") as self.whole:
            self.title = ui.label().classes("muted")
            self.place = ui.element("div").classes("attempts")
        self.whole.set_visibility(False)

    async def refresh(self, api: AsyncClient, job: Job) -> None:
        """Adds the attempts that have failed since the last time."""
        failed = failed_attempts(job)
        self.whole.set_visibility(bool(failed))
        is_trouble = job.status.phase in ("FAILED", "RECOVERING")
        for attempt in failed[-MOST_ATTEMPTS:]:
            if attempt not in self.shown:
                with self.place:
                    self.shown[attempt] = Attempt(api, job.id, attempt)
                self.shown[attempt].whole.move(target_index=0)
                if len(self.shown) > MOST_ATTEMPTS:
                    self.shown.pop(min(self.shown)).whole.delete()
        older = "" if len(failed) <= MOST_ATTEMPTS else f", of which the last {MOST_ATTEMPTS} are here"
        self.title.set_text(f"{counted(len(failed), 'attempt')} failed{older}: the log around the last error")
        if is_trouble and self.opened != failed[-1:]:
            self.opened = failed[-1:]
            self.shown[failed[-1]].whole.set_value(True)
        for shown in self.shown.values():
            await shown.read()


class Attempt:
    """One attempt that has failed; its log is read when it is opened."""

    def __init__(self, api: AsyncClient, job_id: str, attempt: int) -> None:
        self.api, self.job_id, self.attempt = api, job_id, attempt
        self.is_read = False
        self.whole = ui.expansion(f"Attempt {attempt}", on_value_change=self.read).classes("fill")
        self.whole.props("dense")
        with self.whole:
            label = f'tabindex=0 aria-label="Last error of attempt {attempt}"'
            self.lines = ui.html("", sanitize=False).classes("log short").props(label)

    async def read(self) -> None:
        """Shows the lines once it is open."""
        if self.is_read or not self.whole.value:
            return
        self.is_read = True
        try:
            text = await self.api.logs(self.job_id, attempt=self.attempt, tail=READ_LINES)
        except ServiceError:
            self.is_read = False  # the panel of the log says so
            return
        lines = around_last_error(text.splitlines()) or ["This attempt has written nothing."]
        self.lines.set_content("".join(f"<div>{as_html(html.escape(line)) or ' '}</div>" for line in lines))


def failed_attempts(job: Job) -> list[int]:
    """Returns the attempts that ended without what the job was to do: all before the newest, and that one if it did."""
    newest = job.status.attempt
    return list(range(1, newest + (job.status.phase in ("FAILED", "RECOVERING"))))


def around_last_error(lines: list[str]) -> list[str]:
    """Returns the lines around the last one that looks like an error; if none does, the last ones."""
    place = next((i for i in range(len(lines) - 1, -1, -1) if is_error(lines[i])), len(lines) - 1)
    return lines[max(0, place - BEFORE) : place + AFTER + 1]
