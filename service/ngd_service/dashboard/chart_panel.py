"""A panel with a chart, its sentence for those who cannot see it, and its table. Colours come from theme.css.

ECharts draws SVG, because SVG understands CSS variables: one chart serves light and dark. NiceGUI is given a chart's
frame alone: it sends an element whole at each change, so that data goes to the browser by the calls of charts.js.
"""

import csv
import io
import json
import re
import time
from abc import ABC, abstractmethod
from typing import Any

from nicegui import ui

from ngd_service.dashboard.theme import panel

__all__ = ["INK", "LINE", "MUTED", "SURFACE", "TOOLTIP", "ChartPanel", "axis"]

INK, MUTED, LINE, SURFACE = "var(--ink)", "var(--muted)", "var(--line)", "var(--surface)"
TOOLTIP = {
    "backgroundColor": SURFACE,
    "borderColor": LINE,
    "textStyle": {"color": INK, "fontSize": 12.5},
    "confine": True,
}
SENTENCE_S = 10.0  # between two sentences: they are for reading, not for watching


class ChartPanel(ABC):
    """A titled panel that shows a chart or, at the press of a button, the same numbers as a table."""

    def __init__(self, title: str, options: dict[str, Any], *, classes: str = "", height_px: int = 250) -> None:
        with panel(title, classes) as self.head:
            self.whole = ui.context.slot.parent
            self.note = ui.label("No data yet").classes("panel-note digits")
            with ui.element("div").classes("panel-body"):
                with ui.element("div").props(f"role=img aria-describedby={self.note.html_id}") as self.figure:
                    self.chart = ui.echart(options, renderer="svg").classes("chart").style(f"height: {height_px}px")
                self.table = ui.table(rows=[], columns=[], row_key="key", pagination=10).classes("dense fill")
                self.table.props("flat dense").set_visibility(False)
        with self.head:
            ui.element("div").classes("spread")
            self.toggle = (
                ui.button(icon="grid_on", color=None, on_click=self._turn).props("flat round dense").classes("plain")
            )
            self.save = ui.button(icon="download", color=None).props("flat round dense title=Save").classes("plain")
            with self.save, ui.menu().props("auto-close"):
                ui.menu_item("Picture (PNG)", self._save_picture)
                ui.menu_item("Numbers (CSV)", self._save_numbers)
        self.title = title
        self.described_at = -SENTENCE_S
        self.toggle.props("title=Table aria-pressed=false")
        # Not by text: a title may be the label of a user's metric, and a quote in it would end the value.
        self.figure.props["aria-label"] = title
        self.toggle.props["aria-label"] = f"{title} as a table"
        self.save.props["aria-label"] = f"Save {title}"

    @abstractmethod
    def columns(self) -> list[tuple[str, str]]:
        """The table's columns as (key, label)."""

    @abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """The table's rows."""

    @abstractmethod
    def sentence(self) -> str:
        """What the chart shows, in words."""

    def records(self) -> list[dict[str, Any]]:
        """The rows as they are saved: plain numbers."""
        return self.rows()

    def csv(self) -> str:
        """The numbers that are drawn, with the table's columns."""
        text, columns = io.StringIO(), self.columns()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([label for _, label in columns])
        writer.writerows([record.get(key) for key, _ in columns] for record in self.records())
        return text.getvalue()

    def describe(self, *, now: bool) -> bool:
        """Says in words what the chart shows: under its title, and to screen readers; returns whether it did.

        now: False, if it is time to.
        """
        is_time = now or time.monotonic() - self.described_at >= SENTENCE_S
        if is_time:
            self.described_at = time.monotonic()
            self.note.set_text(self.sentence())
        return is_time

    def tell(self, script: str) -> None:
        """Has the browser run calls of charts.js, if there are any."""
        if script:
            self.chart.client.run_javascript(script)

    def refill(self) -> None:
        """Brings the table up to date, if it is shown."""
        if self.table.visible:
            self._fill_table()

    def show(self, *, is_needed: bool) -> None:
        """Shows the panel, or takes it from the page."""
        self.whole.set_visibility(is_needed)

    @property
    def _file_name(self) -> str:
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")

    def _save_picture(self) -> None:
        self.tell(f"ngd.picture({self.chart.id},{json.dumps(self._file_name)})")

    def _save_numbers(self) -> None:
        ui.download.content(self.csv(), f"{self._file_name}.csv", "text/csv")

    def _turn(self) -> None:
        as_table = not self.table.visible
        if as_table:
            self._fill_table()
        self.table.set_visibility(as_table)
        self.figure.set_visibility(not as_table)
        self.toggle.props(
            f"icon={'show_chart' if as_table else 'grid_on'} aria-pressed={str(as_table).lower()} "
            f'title="{"Chart" if as_table else "Table"}"'
        )

    def _fill_table(self) -> None:
        self.table.columns = [
            {"name": key, "label": label, "field": key, "align": "left" if i == 0 else "right"}
            for i, (key, label) in enumerate(self.columns())
        ]
        self.table.rows = self.rows()


def axis(name: str, **more: Any) -> dict[str, Any]:
    """A value axis with its unit, in the theme's colours."""
    return {
        "type": "value",
        "name": name,
        "nameTextStyle": {"color": MUTED, "fontSize": 12},
        "axisLabel": {"color": MUTED, "fontSize": 12, "hideOverlap": True},
        "axisLine": {"lineStyle": {"color": LINE}},
        "axisTick": {"lineStyle": {"color": LINE}},
        "splitLine": {"lineStyle": {"color": LINE}},
        "axisPointer": {"lineStyle": {"color": MUTED}},
    } | more
