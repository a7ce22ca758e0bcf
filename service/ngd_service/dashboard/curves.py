"""Curves over steps. A chart gets its whole data once and then only the new points."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nicegui import ui

from ngd_service.client.units import binary_bytes, number, percent
from ngd_service.dashboard.chart_panel import LINE, MUTED, SURFACE, TOOLTIP, ChartPanel, axis

__all__ = [
    "BYTES",
    "DASHES",
    "LEGEND",
    "MOST_MARKS",
    "PLAIN",
    "RATE",
    "SECONDS",
    "SERIES_COLOURS",
    "SHARE",
    "Curve",
    "Curves",
    "Goal",
    "Mark",
    "Points",
    "Unit",
    "aligned",
    "colour_of",
    "drawn",
    "goal_line",
    "lines_of",
    "value_axis",
]

Points = Sequence[tuple[int, float]]

DASHES = ("solid", [6, 4], [2, 3], [10, 3, 2, 3])
SERIES_COLOURS = 10
MOST_MARKS = 200
LOG_FROM = 100  # times the smallest value is the largest: a linear axis would show the largest alone
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


@dataclass(frozen=True, slots=True)
class Unit:
    """How values of one kind are written: by the browser on axes and in tooltips, by Python in words and tables."""

    name: str
    browser: str
    words: Callable[[float], str]


SIGNIFICANT = (
    "v => { if (v == null) return 'not finite'; const a = Math.abs(v), four = +(+v).toPrecision(4); "
    "return a < 1e3 ? String(four) : a < 1e9 ? (+v).toLocaleString('en-US', {maximumFractionDigits: 1}) : "
    "four.toExponential(); }"
)
PLAIN = Unit("", SIGNIFICANT, number)
RATE = Unit("samples/s", SIGNIFICANT, lambda value: f"{number(value)} samples/s")
SHARE = Unit("%", "v => v == null ? 'not finite' : +(100 * v).toFixed(2) + '%'", percent)
SECONDS = Unit(
    "seconds",
    "v => v == null ? '' : Math.abs(v) >= 1 || !v ? +v.toPrecision(3) + ' s' : +(1000 * v).toPrecision(3) + ' ms'",
    lambda value: number(value) + " s" if value >= 1 else number(1000 * value) + " ms",
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
class Goal:
    """A horizontal line at the value that the job should reach, from below (is_floor) or from above."""

    value: float
    is_floor: bool


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
        goal: Goal | None = None,
    ) -> None:
        self.unit = unit
        self.curves = dict(curves or {})
        self.stacked = stacked
        self.goal = goal
        self.marks: list[Mark] = []
        self.points: dict[str, list[tuple[int, float]]] = {key: [] for key in self.curves}
        self.lost: list[int] = []  # steps with a value that is not finite
        self.highest = 0.0  # sum of stacked parts
        # Values that are not finite have no height: they stand on the step axis, by an own axis from 0 to 1.
        floor = {"type": "value", "min": 0, "max": 1, "show": False}
        options: dict[str, Any] = {
            "animation": False,
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
            "yAxis": [value_axis(axis_name or unit.name, unit, scale=not stacked), floor],
            "series": [],
        }
        super().__init__(title, options)
        self.log_button = self._add_log_button() if may_be_log else None
        self.reader_chose_axis = False
        self._lay_out()

    def replace(self, points: Mapping[str, Points]) -> str:
        """Returns the script that draws these points instead of all that were there."""
        self.points = {key: [] for key in self.curves} | {key: list(values) for key, values in points.items()}
        self.lost, self.highest = [], 0.0
        self._note(points)
        self._choose_axis()
        self._lay_out()
        self.describe(now=True)
        self.refill()
        return self._whole()

    def extend(self, points: Mapping[str, Points]) -> str:
        """Returns the script that adds points at the right end, and nothing else."""
        if not any(points.values()):
            return ""
        if not points.keys() <= self.points.keys():
            whole = {key: [*self.points.get(key, []), *points.get(key, [])] for key in {**self.points, **points}}
            return self.replace(aligned(whole) if self.stacked else whole)
        if self.stacked:
            points = aligned({key: points.get(key, []) for key in self.points})
        starts, known = [len(values) for values in self.points.values()], len(self.lost)
        for key, values in points.items():
            self.points[key].extend(values)
        self._note(points)
        added = [(start, points.get(key, [])) for start, key in zip(starts, self.points, strict=True)]
        self.describe(now=False)
        if self._ticks().items() <= self.chart.options["yAxis"][0].items():
            return self._script(added, known)
        self._lay_out()
        return self._whole()

    def cut(self, last_step: int) -> str:
        """Returns the script that takes the points after this step away."""
        for values in self.points.values():
            while values and values[-1][0] > last_step:
                values.pop()
        self.lost = [step for step in self.lost if step <= last_step]
        return self._script([(len(values), []) for values in self.points.values()], len(self.lost))

    def mark(self, marks: Sequence[Mark]) -> None:
        """Takes these marks, which the browser is sent by others, for the next time that all is drawn."""
        self.marks = [*self.marks, *marks][-MOST_MARKS:]

    def columns(self) -> list[tuple[str, str]]:
        return [("key", "step"), *((key, self._curve(key).label) for key in self.points)]

    def rows(self) -> list[dict[str, Any]]:
        by_step: dict[int, dict[str, Any]] = {}
        for key, values in self.points.items():
            for step, value in values:
                row = by_step.setdefault(step, {"key": step})
                row[key] = self.unit.words(value) if math.isfinite(value) else "not finite"
        return [by_step[step] for step in sorted(by_step, reverse=True)]

    def _add_log_button(self) -> ui.button:
        def turn() -> None:
            self.reader_chose_axis = True
            self._set_axis(is_log=self.chart.options["yAxis"][0]["type"] == "value")
            self._lay_out()
            self.tell(self._whole())

        with self.head:
            button = ui.button("linear", color=None, on_click=turn).props("flat dense no-caps").classes("plain")
            button.props("aria-pressed=false")
            button.props["aria-label"] = f"{self.title} on a logarithmic axis"
            button.move(target_index=2)
        return button

    def _choose_axis(self) -> None:
        """Takes a logarithmic axis for values of many orders of magnitude, until the reader chooses."""
        if self.log_button is None or self.reader_chose_axis:
            return
        values = [value for series in self.points.values() for _, value in series if math.isfinite(value)]
        smallest = min(values, default=0.0)
        self._set_axis(is_log=smallest > 0 and max(values) >= LOG_FROM * smallest)

    def _set_axis(self, *, is_log: bool) -> None:
        assert self.log_button is not None
        self.chart.options["yAxis"][0]["type"] = "log" if is_log else "value"
        self.log_button.props(f"aria-pressed={str(is_log).lower()}").text = "log" if is_log else "linear"

    def _curve(self, key: str) -> Curve:
        return self.curves.get(key) or Curve(key.replace("_", " "))

    def _lay_out(self) -> None:
        """Makes the chart's frame again.

        Its series say nothing of their data: the frame may be laid out after the points have come, and must leave them.
        """
        lines = [self._line(index, key) for index, key in enumerate(self.points)]
        if self.goal is not None:
            lines[0]["markLine"] = goal_line(self.goal, self.unit)
        lines.append(
            {
                "name": "not finite",
                "type": "scatter",
                "yAxisIndex": 1,
                "symbol": "triangle",
                "symbolSize": 11,
                "itemStyle": {"color": "var(--bad)"},
                "markLine": {"silent": True, "symbol": "none", "animation": False, "data": lines_of(self.marks)},
            }
        )
        self.chart.options["series"] = lines
        self.chart.options["yAxis"][0] |= self._ticks()
        drawn = [*map(bool, self.points.values()), bool(self.lost)]
        names = [line["name"] for line, has_points in zip(lines, drawn, strict=True) if has_points]
        self.chart.options["legend"] |= {"data": names, "show": len(names) > 1}
        self.chart.update()

    def _whole(self) -> str:
        return self._script([(0, values) for values in self.points.values()], 0)

    def _script(self, added: Iterable[tuple[int, Points]], lost_start: int) -> str:
        floored = ",".join(f"[{step},0]" for step in self.lost[lost_start:])
        series = [f"[{start},[{drawn(points)}]]" for start, points in added]
        return f"ngd.extend({self.chart.id},[{','.join([*series, f'[{lost_start},[{floored}]]'])}]);"

    def _note(self, points: Mapping[str, Points]) -> None:
        """Takes note of what the new points have that the frame must know of."""
        self.lost += sorted({step for values in points.values() for step, value in values if not math.isfinite(value)})
        if self.unit is BYTES:
            parts = [[value for _, value in values] for values in points.values() if values]
            self.highest = max([self.highest, *map(sum, zip(*parts, strict=False))])

    def _line(self, index: int, key: str) -> dict[str, Any]:
        colour = colour_of(index)
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
        tick = int(2 ** math.ceil(math.log2(max(self.highest, 5) / 5)))
        return {"interval": tick, "max": tick * max(1, math.ceil(self.highest / tick))}

    def sentence(self) -> str:
        known = {key: values for key, values in self.points.items() if values}
        if not known:
            return "No data yet"
        if self.stacked:
            last = max(values[-1][0] for values in known.values())
            total = sum(value for values in known.values() for step, value in values[-1:] if step == last)
            return f"{self.unit.words(total)} in total at step {last:,}"
        said = []
        for key, values in known.items():
            step, value = values[-1]
            said.append(f"{self._curve(key).label} {self.unit.words(value)} at step {step:,}{_trend(values)}")
        return "; ".join(said)


def colour_of(index: int) -> str:
    """The colour of the series of this index, for light and dark."""
    return f"var(--series-{index % SERIES_COLOURS + 1})"


def goal_line(goal: Goal, unit: Unit) -> dict[str, Any]:
    """The goal as ECharts draws it, as the markLine of a series."""
    side = "Bottom" if goal.is_floor else "Top"  # where the curve that has reached it is not
    label = {
        "formatter": f"target {unit.words(goal.value)}",
        "position": f"insideEnd{side}",
        "color": MUTED,
        "fontSize": 11,
        "textBorderColor": SURFACE,  # a curve may pass behind the words
        "textBorderWidth": 3,
    }
    line = {"yAxis": goal.value, "label": label}
    style = {"type": "dashed", "color": "var(--good)", "width": 1.5}
    return {"silent": True, "symbol": "none", "animation": False, "lineStyle": style, "data": [line]}


def aligned(points: Mapping[str, Points]) -> dict[str, Points]:
    """The same steps for every series, as stacking needs them: a part that a step did not report took nothing."""
    steps = sorted({step for values in points.values() for step, _ in values})
    known = {key: dict(values) for key, values in points.items()}
    return {key: [(step, values.get(step, 0.0)) for step in steps] for key, values in known.items()}


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


def drawn(points: Sequence[tuple[float, float]]) -> str:
    """The points as the browser reads them; seven digits are more than a screen has."""
    return ",".join(f"[{step:.12g},{f'{value:.7g}' if math.isfinite(value) else 'null'}]" for step, value in points)


def value_axis(name: str, unit: Unit, **more: Any) -> dict[str, Any]:
    """An axis of values in this unit."""
    named = axis(name, nameLocation="middle", nameGap=52, **more)
    named["axisLabel"] = named["axisLabel"] | {":formatter": unit.browser}
    return named


def _trend(points: Points, window: int = 20) -> str:
    recent = [value for _, value in points[-window:] if math.isfinite(value)]
    if len(recent) < 4:
        return ""
    half = len(recent) // 2
    before, after = sum(recent[:half]) / half, sum(recent[half:]) / (len(recent) - half)
    if abs(after - before) <= 0.01 * max(abs(before), abs(after)):
        return ", steady"
    return ", rising" if after > before else ", falling"
