"""Vertical lines in the charts of a job: where attempts began, where workers were restarted, where checkpoints lie."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ngd_service.dashboard.chart_panel import MUTED
from ngd_service.resources import Event

__all__ = ["LEGEND", "MARKED", "MOST_MARKS", "Mark", "lines_of", "marks"]

MOST_MARKS = 200
MARKED = ("started", "checkpoint")  # kinds of events
LEGEND = (("attempt", "new attempt"), ("restart", "workers restarted"), ("checkpoint", "checkpoint"))


@dataclass(frozen=True, slots=True)
class Mark:
    """A vertical line at a step: a new attempt, a restart of the workers, or a checkpoint."""

    step: int
    kind: str
    label: str


MARK_STYLES: dict[str, dict[str, Any]] = {
    "attempt": {"type": "solid", "color": MUTED, "width": 1.5},
    "restart": {"type": "dashed", "color": "var(--bad)", "width": 1.5},
    "checkpoint": {"type": "dotted", "color": "var(--good)", "width": 1, "opacity": 0.4},
}


def marks(events: Sequence[Event], attempt: int = 0) -> tuple[list[Mark], int]:
    """The vertical lines of a job: where attempts began, where workers were restarted, where checkpoints lie.

    attempt: which one was under way before these events; the one after them comes back.
    """
    found = []
    for event in events:
        if event.kind == "checkpoint":
            found.append(Mark(event.data["step"], "checkpoint", f"checkpoint {event.data['step']}"))
        elif event.kind == "started":
            is_new = event.attempt != attempt
            attempt = event.attempt or 0
            if is_new and attempt > 1:
                found.append(Mark(event.data["resumed_step"], "attempt", f"attempt {attempt}"))
            elif not is_new:
                found.append(Mark(event.data["resumed_step"], "restart", "restart"))
    return found, attempt


def lines_of(marks: Sequence[Mark]) -> list[dict[str, Any]]:
    """The marks as ECharts draws them."""
    return [
        {
            "xAxis": mark.step,
            "lineStyle": MARK_STYLES[mark.kind],
            "label": {"show": mark.kind != "checkpoint", "formatter": mark.label, "color": MUTED, "fontSize": 11},
        }
        for mark in marks
    ]
