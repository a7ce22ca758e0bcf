"""What every page shares: the frame with its bar, the phase badge, the mark of how fresh a page is, empty states."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastapi import Request
from nicegui import ui

__all__ = [
    "CSS",
    "FAVICON",
    "MARK",
    "PHASE_ICONS",
    "RECONNECT_S",
    "Freshness",
    "ask_to_log_in",
    "empty",
    "page_frame",
    "panel",
    "phase_badge",
    "pick_files",
    "reader",
]

PHASE_ICONS = {
    "QUEUED": "schedule",
    "STARTING": "rocket_launch",
    "RUNNING": "play_circle",
    "RECOVERING": "healing",
    "CANCELLING": "pending",
    "SUCCEEDED": "check_circle",
    "FAILED": "error",
    "CANCELLED": "block",
}
# For so long a page is kept for a browser without a connection; one that comes back later loads the page again.
RECONNECT_S = 120.0
CSS = Path(__file__).with_name("theme.css")
SCRIPTS = [Path(__file__).with_name(name) for name in ("charts.js", "page.js")]
FRESH = (
    '<span class="fresh loading"><i class="fresh-icon q-icon material-icons" aria-hidden="true">hourglass_empty</i>'
    '<span class="fresh-word" role="status">Loading</span><span class="fresh-age" aria-hidden="true"></span></span>'
)
KEYS = '<dialog id="keys" aria-labelledby="keys-title"><h2 id="keys-title">Keys</h2><dl></dl></dialog>'
MARK = (
    '<svg viewBox="0 0 24 24" fill="none" aria-hidden="true"><rect width="24" height="24" rx="6" fill="#005f99"/>'
    '<path d="M5 7c5 0 4 10 14 10" stroke="#fff" stroke-width="2.2" stroke-linecap="round"/>'
    '<circle cx="19" cy="17" r="2.2" fill="#e69f00"/></svg>'
)
FAVICON = MARK.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ')
# Browsers throttle hidden tabs but keep their sockets: the page says when nobody looks, and its timers rest.
REPORT_VISIBILITY = "document.addEventListener('visibilitychange', () => emitEvent('visible', !document.hidden))"
# Chosen once per browser; "auto" follows the system.
THEMES = {"auto": ("brightness_auto", None), "light": ("light_mode", False), "dark": ("dark_mode", True)}


class Freshness:
    """Tells the browser that the page is up to date; how long ago it heard so last, the browser knows (page.js)."""

    def __init__(self) -> None:
        self.client = ui.context.client
        ui.html(FRESH, sanitize=False).classes("fresh-place")

    def live(self) -> None:
        """The page was brought up to date just now and will be again."""
        self._tell("live")

    def ended(self, why: str = "") -> None:
        """The page is complete and will not change any more."""
        self._tell("final", why)

    def failed(self) -> None:
        """The page could not be made."""
        self._tell("final", "The page could not be made")

    def stale(self, why: str) -> None:
        """The API did not answer; what is shown stays, with its age."""
        self._tell("stale", why)

    def _tell(self, state: str, why: str = "") -> None:
        self.client.run_javascript(f"page.told({json.dumps(state)},{json.dumps(why)})")


@contextmanager
def page_frame(title: str, reader: str | None = None) -> Iterator[Freshness]:
    """The bar and the column that a page fills; gives the page its freshness mark. reader: who is logged in."""
    ui.page_title(f"{title} · ngd-dist")
    ui.add_css(CSS)
    for script in SCRIPTS:
        ui.add_head_html(f"<script>{script.read_text()}</script>")
    ui.add_body_html(KEYS)
    ui.colors(primary="var(--accent)", negative="var(--bad)")
    ui.run_javascript(REPORT_VISIBILITY)
    with ui.header().classes("bar"), ui.element("div").classes("bar-inner"):
        with ui.link(target="/").classes("brand").props('aria-label="ngd-dist, all jobs"'):
            ui.html(MARK, sanitize=False)
            ui.label("ngd-dist")
        ui.element("div").classes("spread")
        freshness = Freshness()
        keys = ui.button(icon="keyboard", color=None).props('flat round dense aria-label="Keys" title="Keys (?)"')
        keys.classes("plain keys").on("click", js_handler="() => page.help()")
        ThemeButton()
        if reader is not None:
            _log_out(reader)
    with ui.element("main").classes("page"):
        yield freshness


def reader(request: Request) -> str | None:
    """Who is logged in; None: the service has no keys."""
    key_owner: str | None = getattr(request.state, "key_owner", None)
    return key_owner


def ask_to_log_in() -> None:
    """The session has ended: asks for the page again, and the service answers with the login page."""
    ui.navigate.reload()


def _log_out(reader: str) -> None:
    with ui.element("form").props('method=post action="/logout"'):
        label = f"Log out {reader}"
        ui.button(icon="logout", color=None).props(
            f'type=submit flat round dense aria-label="{label}" title="{label}"'
        ).classes("plain")


def phase_badge(phase: str, *, large: bool = False) -> ui.element:
    """A phase as icon, word and colour."""
    with ui.element("span").classes(f"phase {phase}" + (" large" if large else "")) as badge:
        ui.icon(PHASE_ICONS.get(phase, "help")).props("aria-hidden=true")
        ui.label(phase.capitalize())
    return badge


def empty(icon: str, title: str, text: str, code: str | None = None) -> ui.element:
    """A panel that says why there is nothing yet and what to do about it."""
    with ui.element("div").classes("panel empty") as place:
        ui.icon(icon).props("aria-hidden=true")
        ui.label(title).classes("empty-title")
        with ui.element("p"):
            ui.label(text)
        if code:
            with ui.element("pre").classes("code mono"):
                ui.label(code)
    return place


@contextmanager
def panel(title: str, classes: str = "") -> Iterator[ui.element]:
    """A titled panel; yields the row of its title, for buttons."""
    with ui.element("section").classes(f"panel {classes}"):
        with ui.element("div").classes("panel-head") as head, ui.element("h2"):
            ui.label(title)
        yield head


def pick_files(upload: ui.upload) -> str:
    """Returns the browser's handler of a button that stands for an upload, which itself is out of sight."""
    return f"() => document.querySelector('#{upload.html_id} input[type=file]').click()"


class ThemeButton:
    """Turns from the system's colours to light to dark; the browser remembers the choice."""

    def __init__(self) -> None:
        self.mode = ui.dark_mode(None)
        self.button = ui.button(color=None, on_click=self._turn).props("flat round dense").classes("plain")
        self._show("auto")
        ui.on("theme", lambda event: self._show(event.args) if event.args in THEMES else None)
        ui.run_javascript("emitEvent('theme', localStorage.getItem('theme'))")

    def _show(self, name: str) -> None:
        self.name = name
        icon, self.mode.value = THEMES[name]
        self.button.props(f'icon={icon} aria-label="Colours: {name}" title="Colours: {name}"')

    def _turn(self) -> None:
        names = list(THEMES)
        self._show(names[(names.index(self.name) + 1) % len(names)])
        ui.run_javascript(f"localStorage.setItem('theme', '{self.name}')")
