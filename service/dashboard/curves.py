"""Curves over steps. A chart gets its whole data once and then only the new points."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nicegui import ui

from service.dashboard.chart_panel import LINE, MUTED, NO_DATA, TOOLTIP, ChartPanel, axis
from service.dashboard.units import binary_bytes, number, percent

__all__ = ["BYTES", "PLAIN", "SECONDS", "SHARE", "Curve", "Curves", "Mark", "Unit", "connect"]

Points = Sequence[tuple[float, float | None]]

DASHES = ("solid", [6, 4], [2, 3], [10, 3, 2, 3])
SERIES_COLOURS = 10
STEP_POINTER = {"label": {":formatter": "p => 'step ' + Math.round(p.value)"}, "lineStyle": {"color": MUTED}}
LEGEND = {
    "type": "scroll",
    "top": 0,
    "left": 0,
    "itemWidth": 24,
    "itemGap": 9,
    "textStyle": {"color": MUTED, "fontSize": 12},
    "pageTextStyle": {"color": MUTED},
    "pageIconColor": MUTED,
    "pageIconInactiveColor": LINE,
    "pageIconSize": 11,
}
# Extends the data that the browser holds and redraws. It says where the new points begin: if the browser got them
# with a whole update already, they replace themselves.
EXTEND = (
    "(e => {{ {added}.forEach(([start, points], i) => e?.options.series[i].data.splice(start, 1e9, ...points)); "
    "e?.update_chart(); }})(getElement({id}))"
)
CONNECT = (
    "import('nicegui-echart').then(m => {{ {ids}.forEach(i => {{ const e = getElement(i); if (e?.chart) "
    "e.chart.group = 'steps'; }}); m.echarts.connect('steps'); }})"
)


@dataclass(frozen=True, slots=True)
class Unit:
    """How values of one kind are written: by the browser on axes and in tooltips, by Python in words and tables."""

    name: str
    browser: str
    words: Callable[[float | None], str]


SIGNIFICANT = "v => v == null ? 'not finite' : String(+(+v).toPrecision(4))"
PLAIN = Unit("", SIGNIFICANT, number)
SHARE = Unit("%", "v => v == null ? 'not finite' : +(100 * v).toFixed(2) + '%'", percent)
SECONDS = Unit(
    "seconds",
    "v => v == null ? '' : Math.abs(v) >= 1 || !v ? +v.toPrecision(3) + ' s' : +(1000 * v).toPrecision(3) + ' ms'",
    lambda value: number(value) + " s" if value is None or value >= 1 else number(1000 * value) + " ms",
)
BYTES = Unit(
    "bytes",
    "v => { if (!v) return v == null ? '' : '0 B'; const p = Math.min(4, Math.floor(Math.log2(v) / 10)); "
    "return +(v / 1024 ** p).toPrecision(3) + ' ' + ['B', 'KiB', 'MiB', 'GiB', 'TiB'][p]; }",
    binary_bytes,
)


@dataclass(frozen=True, slots=True)
class Curve:
    """How one series is drawn: its name, and marks at its points when it has few."""

    label: str
    dotted: bool = False


@dataclass(frozen=True, slots=True)
class Mark:
    """A vertical line at a step: a new attempt, a restart of the workers, or a checkpoint."""

    step: int
    kind: str
    label: str


MARK_STYLES: dict[str, dict[str, Any]] = {
    "attempt": {"type": "solid", "color": MUTED, "width": 1.5},
    "restart": {"type": "dashed", "color": "var(--bad)", "width": 1.5},
    "checkpoint": {"type": "dotted", "color": "var(--good)", "width": 1, "opacity": 0.7},
}


class Curves(ChartPanel):
    """Values over steps, one line per series; stacked areas when `stacked`. Series may appear while it runs."""

    def __init__(
        self,
        title: str,
        *,
        unit: Unit = PLAIN,
        curves: Mapping[str, Curve] | None = None,
        stacked: bool = False,
        axis_name: str = "",
        may_be_log: bool = False,
    ) -> None:
        self.unit = unit
        self.curves = dict(curves or {})
        self.stacked = stacked
        self.marks: list[Mark] = []
        self.points: dict[str, list[tuple[float, float | None]]] = {key: [] for key in self.curves}
        # Values that are not finite have no height: they stand on the step axis, by an own axis from 0 to 1.
        floor = {"type": "value", "min": 0, "max": 1, "show": False}
        options: dict[str, Any] = {
            "animation": False,
            "title": dict(NO_DATA),
            "grid": {"left": 74, "right": 18, "top": 34, "bottom": 40},
            "legend": LEGEND | ({"itemWidth": 11, "itemHeight": 11, "icon": "roundRect"} if stacked else {}),
            "tooltip": TOOLTIP | {"trigger": "axis", ":valueFormatter": unit.browser},
            "dataZoom": [{"type": "inside", "zoomOnMouseWheel": "ctrl", "moveOnMouseMove": "shift"}],
            "xAxis": axis(
                "step",
                nameLocation="middle",
                nameGap=24,
                min="dataMin",
                max="dataMax",
                minInterval=1,
                axisPointer=STEP_POINTER,
            ),
            "yAxis": [_value_axis(axis_name or unit.name, unit, scale=not stacked), floor],
            "series": [],
        }
        super().__init__(title, options)
        if may_be_log:
            self._add_log_button()
        self._lay_out()

    def replace(self, points: Mapping[str, Points]) -> None:
        """Draws these points instead of all that were there."""
        self.points = {key: [] for key in self.curves} | {key: list(values) for key, values in points.items()}
        self._lay_out()

    def extend(self, points: Mapping[str, Points]) -> None:
        """Adds points at the right end; the browser is sent nothing else."""
        if not any(points.values()):
            return
        if not points.keys() <= self.points.keys():
            self.replace({key: [*self.points.get(key, []), *points.get(key, [])] for key in {**self.points, **points}})
            return
        for key, values in points.items():
            self.points[key].extend(values)
        new = [self._drawn(points.get(key, [])) for key in self.points] + [self._floored(points)]
        added = []
        for series, drawn in zip(self.chart.options["series"], new, strict=True):
            added.append([len(series["data"]), drawn])
            series["data"].extend(drawn)
        ui.run_javascript(EXTEND.format(added=json.dumps(added), id=self.chart.id))
        if not self._ticks().items() <= self.chart.options["yAxis"][0].items():
            self._lay_out()
        self.describe(self._sentence())

    def mark(self, marks: Sequence[Mark]) -> None:
        """Draws these vertical lines."""
        if list(marks) != self.marks:
            self.marks = list(marks)
            self._lay_out()

    def columns(self) -> list[tuple[str, str]]:
        return [("key", "step"), *((key, self._curve(key).label) for key in self.points)]

    def rows(self) -> list[dict[str, Any]]:
        by_step: dict[float, dict[str, Any]] = {}
        for key, values in self.points.items():
            for step, value in values:
                row = by_step.setdefault(step, {"key": int(step)})
                row[key] = "not finite" if value is None or not math.isfinite(value) else self.unit.words(value)
        return [by_step[step] for step in sorted(by_step, reverse=True)]

    def _add_log_button(self) -> None:
        def turn() -> None:
            height = self.chart.options["yAxis"][0]
            is_log = height["type"] == "value"
            height["type"] = "log" if is_log else "value"
            button.props(f"aria-pressed={str(is_log).lower()}").text = "log" if is_log else "linear"
            self.chart.update()

        with self.head:
            button = ui.button("linear", color=None, on_click=turn).props("flat dense no-caps").classes("plain")
            button.props(f'aria-label="{self.title} on a logarithmic axis" aria-pressed=false')
            button.move(target_index=2)

    def _curve(self, key: str) -> Curve:
        return self.curves.get(key) or Curve(key.replace("_", " "))

    def _lay_out(self) -> None:
        lines = [self._line(index, key) for index, key in enumerate(self.points)]
        lines.append(
            {
                "name": "not finite",
                "type": "scatter",
                "yAxisIndex": 1,
                "symbol": "triangle",
                "symbolSize": 11,
                "itemStyle": {"color": "var(--bad)"},
                "data": self._floored(self.points),
                "markLine": self._mark_line(),
            }
        )
        self.chart.options["series"] = lines
        self.chart.options["yAxis"][0] |= self._ticks()
        has_data = any(self.points.values())
        self.chart.options["title"]["show"] = not has_data
        names = [line["name"] for line in lines if line["name"] != "not finite" or line["data"]]
        self.chart.options["legend"]["data"] = names
        self.chart.options["legend"]["show"] = has_data and len(names) > 1
        self.chart.update()
        self.describe(self._sentence())

    def _line(self, index: int, key: str) -> dict[str, Any]:
        colour = f"var(--series-{index % SERIES_COLOURS + 1})"
        curve = self._curve(key)
        line: dict[str, Any] = {
            "name": curve.label,
            "type": "line",
            "showSymbol": curve.dotted,
            "symbol": "circle",
            "symbolSize": 7 if curve.dotted else 5,
            "lineStyle": {"color": colour, "width": 1.75, "type": DASHES[index % len(DASHES)]},
            "itemStyle": {"color": colour},
            "emphasis": {"disabled": True},
            "data": self._drawn(self.points[key]),
        }
        if self.stacked:
            line |= {"stack": "all", "areaStyle": {"color": colour, "opacity": 0.55}}
            line["lineStyle"] = {"color": colour, "width": 1}
            line["symbol"] = "none"
        return line

    def _ticks(self) -> dict[str, int]:
        """Where an axis in bytes has its ticks: about five, at multiples of a power of two; other axes choose."""
        if self.unit is not BYTES:
            return {}
        parts = [[value or 0 for _, value in points] for points in self.points.values() if points]
        highest = max(map(sum, zip(*parts, strict=False)), default=0)
        tick = int(2 ** math.ceil(math.log2(max(highest, 5) / 5)))
        return {"interval": tick, "max": tick * max(1, math.ceil(highest / tick))}

    def _mark_line(self) -> dict[str, Any]:
        return {
            "silent": True,
            "symbol": "none",
            "animation": False,
            "data": [
                {
                    "xAxis": mark.step,
                    "lineStyle": MARK_STYLES[mark.kind],
                    "label": {
                        "show": mark.kind != "checkpoint",
                        "formatter": mark.label,
                        "color": MUTED,
                        "fontSize": 11,
                    },
                }
                for mark in self.marks
            ],
        }

    @staticmethod
    def _drawn(points: Points) -> list[list[float | None]]:
        return [[step, value if value is not None and math.isfinite(value) else None] for step, value in points]

    @staticmethod
    def _floored(points: Mapping[str, Points]) -> list[list[float]]:
        lost = {
            step for values in points.values() for step, value in values if value is None or not math.isfinite(value)
        }
        return [[step, 0] for step in sorted(lost)]

    def _sentence(self) -> str:
        said = []
        for key, values in self.points.items():
            if values:
                step, value = values[-1]
                said.append(f"{self._curve(key).label} {self.unit.words(value)} at step {int(step):,}{_trend(values)}")
        if self.stacked and said:
            last = max(values[-1] for values in self.points.values() if values)[0]
            total = sum(value or 0 for values in self.points.values() for step, value in values[-1:] if step == last)
            return f"{self.unit.words(total)} in total at step {int(last):,}"
        return "; ".join(said)


def _value_axis(name: str, unit: Unit, **more: Any) -> dict[str, Any]:
    named = axis(name, nameLocation="middle", nameGap=52, **more)
    named["axisLabel"] = named["axisLabel"] | {":formatter": unit.browser}
    return named


def connect(charts: Sequence[ChartPanel]) -> None:
    """Gives the charts one cursor and one zoom: pointing at a step in one shows it in all."""
    ui.run_javascript(CONNECT.format(ids=json.dumps([chart.chart.id for chart in charts])))


def _trend(points: Points, window: int = 20) -> str:
    recent = [value for _, value in points[-window:] if value is not None and math.isfinite(value)]
    if len(recent) < 4:
        return ""
    half = len(recent) // 2
    before, after = sum(recent[:half]) / half, sum(recent[half:]) / (len(recent) - half)
    if abs(after - before) <= 0.01 * max(abs(before), abs(after)):
        return ", steady"
    return ", rising" if after > before else ", falling"
