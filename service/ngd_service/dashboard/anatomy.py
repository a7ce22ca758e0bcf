"""Where the time of a step goes: the median and the slow end of each phase, over the newest steps."""

import math
import time
from collections import deque
from typing import Any

from nicegui import ui

from ngd_service.client.units import percent
from ngd_service.dashboard.measures import SECONDS
from ngd_service.dashboard.theme import panel
from ngd_service.resources import Metrics

__all__ = ["Anatomy", "quantile"]

NEWEST = 200
TABLE_S = 60.0  # between two tables, which are sent whole
COLUMNS = (("phase", "phase"), ("p50", "p50"), ("p95", "p95"), ("share", "share"))


class Anatomy:
    """A table of the phases of rank 0, the longest first; `PhasesByRank` has all ranks, as means."""

    num_steps = NEWEST

    def __init__(self) -> None:
        self.steps: deque[dict[str, float]] = deque(maxlen=NEWEST)
        self.last_step = 0
        self.shown_at = -TABLE_S
        with panel("Phases of a step") as head:
            self.whole = ui.context.slot.parent
            self.note = ui.label("No data yet").classes("panel-note digits")
            columns = [
                {"name": key, "label": label, "field": key, "align": "right" if key != "phase" else "left"}
                for key, label in COLUMNS
            ]
            with ui.element("div").classes("panel-body"):
                self.table = ui.table(rows=[], columns=columns, row_key="phase", pagination=0).classes("dense fill")
                self.table.props('flat dense hide-pagination aria-label="Phases of a step"')
        with head:
            ui.element("div").classes("spread")

    def add(self, metrics: Metrics, *, now: bool = False) -> None:
        """Takes the steps that are new, each by itself. now: shows them at once, not when it is time to."""
        parts = {name.partition(".")[2]: of for name, of in metrics.series.items() if name.startswith("seconds.")}
        by_step: dict[int, dict[str, float]] = {}
        for part, series in parts.items():
            for step, value in zip(series.steps, series.values, strict=True):
                if step > self.last_step:
                    by_step.setdefault(step, {})[part] = value
        for step in sorted(by_step):
            self.steps.append(by_step[step])
            self.last_step = step
        if self.steps and (now or time.monotonic() - self.shown_at >= TABLE_S):
            self.shown_at = time.monotonic()
            self.table.rows = self.rows()
            total = [sum(phases.values()) for phases in self.steps]
            ends = SECONDS.words(quantile(total, 0.5)), SECONDS.words(quantile(total, 0.95))
            data = sum(phases.get("data", 0.0) for phases in self.steps) / (sum(total) or 1.0)
            waits = f"; the loader takes {percent(data)}" if any("data" in phases for phases in self.steps) else ""
            takes = f"a step takes {ends[0]} (p50), {ends[1]} (p95){waits}"
            self.note.set_text(f"{takes}; last {len(total):,} steps, rank 0")

    def redo(self, last_step: int) -> None:
        """The steps after this one are done again."""
        self.steps.clear()
        self.last_step = min(self.last_step, last_step)

    def rows(self) -> list[dict[str, Any]]:
        """The table's rows; a phase that a step did not have took no time in it."""
        names = dict.fromkeys(name for phases in self.steps for name in phases)
        of_phase = {name: [phases.get(name, 0.0) for phases in self.steps] for name in names}
        whole = sum(map(sum, of_phase.values())) or 1.0
        in_order = sorted(of_phase.items(), key=lambda item: -sum(item[1]))
        return [
            {
                "phase": name.replace("_", " "),
                "p50": SECONDS.words(quantile(values, 0.5)),
                "p95": SECONDS.words(quantile(values, 0.95)),
                "share": percent(sum(values) / whole),
            }
            for name, values in in_order
        ]


def quantile(values: list[float], share: float) -> float:
    """Returns the smallest of the values that at least this share of them does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
