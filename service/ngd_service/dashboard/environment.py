"""In which world a job runs: versions, commit, the code's hash, and the parameters that no layer covers."""

import html
from collections.abc import Mapping
from typing import Any

from nicegui import ui

from ngd_service.client.units import counted
from ngd_service.dashboard.theme import panel
from ngd_service.resources import Event, Job

__all__ = ["EnvironmentPanel", "FallbackPanel", "by_reason", "facts"]

MOST_NAMES = 6


class EnvironmentPanel:
    """What the newest start of the workers tells of it."""

    def __init__(self) -> None:
        with panel("Environment"):
            self.whole = ui.context.slot.parent
            with ui.element("div").classes("panel-body"):
                self.list = ui.html("", sanitize=False).classes("plain-table")

    def show(self, job: Job, started: Event) -> None:
        """Takes the newest start."""
        rows = "".join(
            f"<tr><th>{html.escape(name)}<td>{html.escape(value)}</tr>" for name, value in facts(job, started)
        )
        self.list.set_content(f"<table class=pairs>{rows}</table>")


class FallbackPanel:
    """The parameters that the fallback updates, by the reason why."""

    def __init__(self) -> None:
        with panel("Left to the fallback", "wide"):
            self.whole = ui.context.slot.parent
            self.note = ui.label().classes("panel-note digits")
            with ui.element("div").classes("panel-body"):
                self.table = ui.html("", sanitize=False).classes("plain-table")

    def show(self, reasons: Mapping[str, str]) -> None:
        """Takes the reason of each parameter that no preconditioner covers."""
        self.whole.set_visibility(bool(reasons))
        self.note.set_text(f"{counted(len(reasons), 'parameter')} without a preconditioner")
        rows = "".join(
            f"<tr><td>{html.escape(reason)}<td class='digits right'>{len(names):,}<td class=mono>{_some(names)}</tr>"
            for reason, names in by_reason(reasons).items()
        )
        head = "<tr><th>reason<th class=right>parameters<th>names</tr>"
        self.table.set_content(f"<table>{head}{rows}</table>")


def by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Returns the parameters of each reason, the reason with most of them first."""
    grouped: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        grouped.setdefault(reason, []).append(name)
    return dict(sorted(grouped.items(), key=lambda item: -len(item[1])))


def facts(job: Job, started: Event) -> list[tuple[str, str]]:
    """Returns name and value of each thing that is known."""
    data, code = started.data, job.spec.get("code") or {}
    known = [
        *data["versions"].items(),
        ("commit", data.get("commit") or "not from a checkout"),
        ("code", f"sha256 {code['sha256']}" if code.get("sha256") else "the workers' own"),
        ("device", f"{data['world_size']} x {data['device']}"),
        ("parameters", f"{data['parameters']:,}" if data.get("parameters") else ""),
        ("left to the fallback", _fallback(data)),
        ("seed", str(data["seed"])),
        ("job", job.id),
    ]
    return [(name.replace("_", " "), str(value)) for name, value in known if value]


def _fallback(data: Mapping[str, Any]) -> str:
    reasons = data.get("plain_parameters")
    return counted(len(reasons), "parameter") if reasons else "no parameter" if data["statistics"] else ""


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
    return html.escape(", ".join(names[:MOST_NAMES]) + more)
