"""The log of a job: any attempt and rank, followed to its end, searched, or at its first error."""

import html
import json
from collections.abc import AsyncIterator
from urllib.parse import urlencode

from nicegui import ui

from ngd_service.client.client import AsyncClient, ServiceError
from ngd_service.client.units import counted
from ngd_service.dashboard.ansi import as_html
from ngd_service.dashboard.log_search import around_first_error, is_error, matches
from ngd_service.dashboard.theme import panel
from ngd_service.resources import Job

__all__ = ["LOG_LINES", "LogPanel", "unseen"]

LOG_LINES = 500
BEFORE_ERROR = 20  # lines in view above it
ALL = -1  # among ranks: the output of all, and of the driver


class LogPanel:
    """Follows the end of the newest attempt's log until the reader scrolls up, searches, or chooses another."""

    def __init__(self, api: AsyncClient, job_id: str) -> None:
        self.api, self.job_id = api, job_id
        self.lines: list[str] = []
        self.attempt: int | None = None  # None: the newest
        self.rank = ALL
        self.is_following = True
        self.newest = 0
        with panel("Log", "wide") as head, ui.element("div").classes("panel-body"):
            self.note = ui.label("Nothing written yet").classes("muted digits")
            self.log = ui.element("pre").classes("log").props('tabindex=0 role=log aria-label="Log"')
        self.log.set_visibility(False)
        with head:
            self._lay_out_tools()

    def _lay_out_tools(self) -> None:
        ui.element("div").classes("spread")
        with ui.element("div").classes("log-tools"):
            self.attempts = ui.select({}, on_change=self._choose).props('dense outlined aria-label="Attempt"')
            self.ranks = ui.select({ALL: "All ranks"}, value=ALL, on_change=self._choose)
            self.ranks.props('dense outlined aria-label="Rank"')
            self.search = ui.input(placeholder="Search", on_change=self._search)
            self.search.props('dense outlined clearable debounce=300 aria-label="Search the log"')
            self.to_error = ui.button("First error", icon="error_outline", color=None, on_click=self._show_error)
            self.to_end = ui.button("Follow", icon="vertical_align_bottom", color=None, on_click=self._follow)
            for button in (self.to_error, self.to_end):
                button.props("flat dense no-caps").classes("plain")
            self.link = ui.link("Download").props("download").classes("tool-link")
        self._aim_link()

    async def refresh(self, job: Job) -> None:
        """Brings the end of the log up to date, unless the reader looks at another part."""
        self._offer(job)
        if self.is_following:
            self.show(await self._read(tail=LOG_LINES))

    def show(self, text: str) -> None:
        """Takes the log's tail; lines that are there already are not sent again."""
        new = unseen(self.lines, text.splitlines())
        if not new:
            return
        self.lines = [*self.lines, *new][-LOG_LINES:]
        self.note.set_text("")
        self._send(new)

    def _offer(self, job: Job) -> None:
        """Offers the attempts that there are, and the ranks of the most workers that they may have."""
        if job.status.attempt == self.newest:
            return
        self.newest = job.status.attempt
        self.attempts.set_options({n: f"Attempt {n}" for n in range(self.newest, 0, -1)}, value=self.newest)
        ranks = {rank: f"Rank {rank}" for rank in range(job.spec["resources"]["workers"])}
        self.ranks.set_options({ALL: "All ranks"} | ranks, value=self.rank)
        self.ranks.set_visibility(len(ranks) > 1)
        self.attempts.set_visibility(self.newest > 1)

    async def _read(self, tail: int | None = None) -> str:
        rank = None if self.rank == ALL else self.rank
        return await self.api.logs(self.job_id, attempt=self.attempt, rank=rank, tail=tail)

    async def _choose(self) -> None:
        attempt = self.attempts.value
        chosen = None if attempt == self.newest else attempt, int(self.ranks.value)
        if chosen != (self.attempt, self.rank):
            self.attempt, self.rank = chosen
            self._aim_link()
            await (self._search() if self.search.value else self._follow())

    def _aim_link(self) -> None:
        query = {"download": "true"} | ({} if self.attempt is None else {"attempt": self.attempt})
        query |= {} if self.rank == ALL else {"rank": self.rank}
        self.link.props["href"] = f"/api/v1/jobs/{self.job_id}/logs?{urlencode(query)}"
        self.link.update()

    async def _follow(self) -> None:
        self.is_following = True
        self.search.set_value("")
        await self._show_all(LOG_LINES)

    async def _search(self) -> None:
        wanted = self.search.value or ""
        if not wanted:
            if not self.is_following:
                await self._follow()
            return
        self.is_following = False
        self.note.set_text("Searching the whole log ...")
        try:
            found = await matches(self._parts(), wanted, LOG_LINES)
        except ServiceError as error:
            ui.notify(f"The log can't be read: {error}", type="negative")
            return
        if self.search.value != wanted:
            return  # the reader looks for something else by now
        self._replace(list(found.lines))
        most = f"; the last {LOG_LINES}" if found.num_matching > LOG_LINES else ""
        lines = counted(found.num_lines, "line")
        self.note.set_text(f"{found.num_matching:,} of {lines} hold “{wanted}”{most}")

    async def _show_error(self) -> None:
        self.note.set_text("Looking for the first error ...")
        try:
            found = await around_first_error(self._parts(), BEFORE_ERROR, LOG_LINES)
        except ServiceError as error:
            ui.notify(f"The log can't be read: {error}", type="negative")
            return
        if found is None:
            self.note.set_text("")
            ui.notify("No line of this log looks like an error")
            return
        self.is_following = False
        lines, place, number = found
        self._replace(lines, at=place)
        self.note.set_text(f"first error at line {number:,}")

    async def _parts(self) -> AsyncIterator[list[str]]:
        """Yields all lines that are kept of the log, a MiB at a time."""
        attempt, rank, offset = self.attempt, None if self.rank == ALL else self.rank, 0
        while True:
            text, end = await self.api.log_part(self.job_id, offset=offset, attempt=attempt, rank=rank)
            if end <= offset:
                return
            offset = end
            yield text.splitlines()

    async def _show_all(self, tail: int) -> None:
        try:
            text = await self._read(tail=tail)
        except ServiceError as error:
            self.note.set_text(str(error))
            text = ""
        else:
            self.note.set_text("" if text else "Nothing written yet")
        self._replace(text.splitlines())

    def _replace(self, lines: list[str], at: int | None = None) -> None:
        self.lines = lines if self.is_following else []
        self._send(lines, at=at, is_whole=True)

    def _send(self, lines: list[str], *, at: int | None = None, is_whole: bool = False) -> None:
        self.log.set_visibility(True)
        written = json.dumps("".join(map(_line, lines)))
        place = "null" if at is None else at
        call = f"ngd.log('{self.log.html_id}',{written},{LOG_LINES},{json.dumps(is_whole)},{place})"
        self.log.client.run_javascript(call)


def _line(line: str) -> str:
    mark = " class=error" if is_error(line) else ""
    return f"<div{mark}>{as_html(html.escape(line)) or ' '}</div>"


def unseen(shown: list[str], tail: list[str]) -> list[str]:
    """The lines of `tail` that follow what is shown, where the end of one and the start of the other overlap."""
    for start in range(max(0, len(shown) - len(tail)), len(shown)):
        if shown[start:] == tail[: len(shown) - start]:
            return tail[len(shown) - start :]
    return tail
