"""What went wrong, first on the page: the last error in words, and the lines of the log around it."""

import html

from nicegui import ui

from ngd_service.client.client import AsyncClient, ServiceError
from ngd_service.dashboard.ansi import as_html
from ngd_service.dashboard.logs import is_error
from ngd_service.resources import Job

__all__ = ["Trouble", "around_last_error"]

READ_LINES = 2_000
BEFORE, AFTER = 14, 3  # a traceback stands above its error


class Trouble:
    """The lines of the log around the last error of a job that failed or is tried again."""

    def __init__(self) -> None:
        self.told: tuple[str, int] | None = None  # phase and attempt
        with ui.element("div").classes("panel trouble") as self.whole:
            ui.label("The log around the last error").classes("muted")
            self.lines = ui.html("", sanitize=False).classes("log short").props('tabindex=0 aria-label="Last error"')
        self.whole.set_visibility(False)

    async def refresh(self, api: AsyncClient, job: Job) -> None:
        """Reads the log of the attempt that failed, once for each failure."""
        status = job.status
        if status.phase not in ("FAILED", "RECOVERING") or status.attempt == 0:
            self.whole.set_visibility(False)
            self.told = None
            return
        if self.told == (status.phase, status.attempt):
            return
        try:
            text = await api.logs(job.id, attempt=status.attempt, tail=READ_LINES)
        except ServiceError:
            return  # the panel of the log says so
        self.told = (status.phase, status.attempt)
        lines = around_last_error(text.splitlines())
        self.lines.set_content("".join(f"<div>{as_html(html.escape(line)) or ' '}</div>" for line in lines))
        self.whole.set_visibility(bool(lines))


def around_last_error(lines: list[str]) -> list[str]:
    """Returns the lines around the last one that looks like an error; if none does, the last ones."""
    place = next((i for i in range(len(lines) - 1, -1, -1) if is_error(lines[i])), len(lines) - 1)
    return lines[max(0, place - BEFORE) : place + AFTER + 1]
