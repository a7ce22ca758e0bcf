"""Curves over steps. A chart gets its whole data once and then only the new points."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nicegui import ui

from ngd_service.client.units import counted
from ngd_service.dashboard.chart_panel import LINE, MUTED, SURFACE, TOOLTIP, ChartPanel, axis
from ngd_service.dashboard.marks import MOST_MARKS, Mark, lines_of
from ngd_service.dashboard.measures import BYTES, PLAIN, SHARE, Unit
from ngd_service.dashboard.smoothing import Points, aligned, range_without_outliers, smoothed, trend
from ngd_service.dashboard.view import View

__all__ = [
    "DASHES", "DRAGGING", "LEGEND", "QUIET", "SERIES_COLOURS", "ZOOM",
    "Curve", "Curves", "Goal", "colour_of", "drawn", "goal_line", "not_finite", "step_axis", "value_axis",
]  # fmt: skip

DASHES = ("solid", [6, 4], [2, 3], [10, 3, 2, 3])
SERIES_COLOURS = 10
MOST_SYMBOLS = 60  # of a series: more of them hide it
LOG_FROM = 100  # times the smallest value is the largest: a linear axis would show the largest alone
STEP_POINTER = {"label": {":formatter": "p => 'step ' + Math.round(p.value)"}, "lineStyle": {"color": MUTED}}
QUIET = {"silent": True, "symbol": "none", "animation": False}
ZOOM = {"type": "inside", "zoomOnMouseWheel": "ctrl", "moveOnMouseMove": "shift"}
# ECharts' own tool for a dragged selection; its buttons are out of sight, for it is always on.
DRAGGING = {"top": -60, "feature": {"dataZoom": {"yAxisIndex": "none", "brushStyle": {"color": MUTED, "opacity": 0.2}}}}
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
class Curve:
    """How one series is drawn: its name, marks at its points when it has few, and whether a reader may smooth it."""

    label: str
    dotted: bool = False
    may_be_smooth: bool = False


@dataclass(frozen=True, slots=True)
class Goal:
    """A horizontal line at a value to compare with; is_floor: the curve is to come from below."""

    value: float
    is_floor: bool = False
    label: str = "target"


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
        goals: Sequence[Goal] = (),
        view: View | None = None,
        classes: str = "",
    ) -> None:
        self.view = view or View()
        self.unit = unit
        self.curves = dict(curves or {})
        self.stacked = stacked
        self.goals = list(goals)
        self.marks: list[Mark] = []
        self.points: dict[str, list[tuple[int, float]]] = {key: [] for key in self.curves}
        self.lost: list[int] = []  # steps with a value that is not finite
        self.highest = 0.0  # sum of stacked parts
        self.calm_range: tuple[float, float] | None = None
        self.ranges: dict[str, Any] = {}  # of the axes, as the browser has them
        # Values that are not finite have no height: they stand on the step axis, by an own axis from 0 to 1.
        floor = {"type": "value", "min": 0, "max": 1, "show": False}
        options: dict[str, Any] = {
            "animation": False,
            "grid": {"left": 74, "right": 18, "top": 34, "bottom": 40},
            "legend": LEGEND | ({"itemWidth": 11, "itemHeight": 11, "icon": "roundRect"} if stacked else {}),
            "tooltip": TOOLTIP | {"trigger": "axis", ":valueFormatter": unit.browser},
            "toolbox": DRAGGING,
            "dataZoom": [ZOOM],
            "xAxis": step_axis(),
            "yAxis": [value_axis(axis_name or unit.name, unit, scale=not stacked), floor],
            "series": [],
        }
        super().__init__(title, options, classes=classes)
        self.log_button = self._add_log_button() if may_be_log else None
        self._lay_out()

    def replace(self, points: Mapping[str, Points]) -> str:
        """Returns the script that draws these points instead of all that were there."""
        self.points = {key: [] for key in self.curves} | {key: list(values) for key, values in points.items()}
        self.lost, self.highest = [], 0.0
        self._note(points)
        self._choose_axis()
        self._look_for_outliers()
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
        if self.describe(now=False):
            self._look_for_outliers()
        return self._script(starts, known) + self._stretch()

    def cut(self, last_step: int) -> str:
        """Returns the script that takes the points after this step away."""
        for values in self.points.values():
            while values and values[-1][0] > last_step:
                values.pop()
        self.lost = [step for step in self.lost if step <= last_step]
        return self._script([len(values) for values in self.points.values()], len(self.lost))

    def mark(self, marks: Sequence[Mark]) -> None:
        """Takes these marks, which the browser is sent by others, for the next time that all is drawn."""
        self.marks = [*self.marks, *marks][-MOST_MARKS:]

    def redraw(self) -> str:
        """Returns the script that draws all again, after the view has changed."""
        self._look_for_outliers()
        self._lay_out()
        self.describe(now=True)
        return self._whole()

    def columns(self) -> list[tuple[str, str]]:
        return [("key", "step"), *((key, self._curve(key).label) for key in self.points)]

    def rows(self) -> list[dict[str, Any]]:
        return self._table(lambda key, value: self._words(key, value) if math.isfinite(value) else "not finite")[::-1]

    def records(self) -> list[dict[str, Any]]:
        return self._table(lambda _, value: value)

    def _table(self, cell: Callable[[str, float], Any]) -> list[dict[str, Any]]:
        by_step: dict[int, dict[str, Any]] = {}
        for key, values in self.points.items():
            for step, value in values:
                by_step.setdefault(step, {"key": step})[key] = cell(key, value)
        return [by_step[step] for step in sorted(by_step)]

    def _words(self, key: str, value: float) -> str:
        return self.unit.words(value)

    def _add_log_button(self) -> ui.button:
        def turn() -> None:
            self.view.axes[self.title] = is_log = self.chart.options["yAxis"][0]["type"] == "value"
            self._set_axis(is_log=is_log)
            self.tell(self.redraw() + self.view.script)

        with self.head:
            button = ui.button("linear", color=None, on_click=turn).props("flat dense no-caps").classes("plain")
            button.props("aria-pressed=false")
            button.props["aria-label"] = f"{self.title} on a logarithmic axis"
            button.move(target_index=2)
        return button

    def _choose_axis(self) -> None:
        """Takes a logarithmic axis for values of many orders of magnitude, until the reader chooses."""
        if self.log_button is None:
            return
        if self.title in self.view.axes:
            self._set_axis(is_log=self.view.axes[self.title])
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
        if self.goals and lines:
            lines[0]["markLine"] = {"data": [goal_line(goal, self.unit) for goal in self.goals]} | QUIET
        pale = [self._pale(lines[index]) for index, key in enumerate(self.points) if key in self._smoothed]
        self.chart.options["series"] = [*lines, *pale, self._floor()]
        self.ranges = self._ranges()
        self.chart.options["yAxis"][0] |= self.ranges["yAxis"][0]
        has_points = [*map(bool, self.points.values())]
        names = [line["name"] for line, is_there in zip(lines, has_points, strict=True) if is_there]
        names += ["not finite"] if self.lost else []
        self.chart.options["legend"] |= {"data": names, "show": len(names) > 1}
        self.chart.options["grid"] |= {"top": 34 if len(names) > 1 else 14}
        self.chart.update()

    @property
    def _smoothed(self) -> list[str]:
        return [key for key in self.points if self.view.smoothing and self._curve(key).may_be_smooth]

    def _floor(self) -> dict[str, Any]:
        """The series of what has no height, and of the marks."""
        return not_finite() | {"markLine": {"data": lines_of(self.marks)} | QUIET}

    def _whole(self) -> str:
        return self._script([0] * len(self.points), 0)

    def _script(self, starts: Sequence[int], lost_start: int) -> str:
        """Returns the script that sends the points of each series from a place on."""
        places, weight = dict(zip(self.points, starts, strict=True)), self.view.smoothing
        lines = {key: smoothed(of, weight) if key in self._smoothed else of for key, of in self.points.items()}
        shown = [*lines.items(), *((key, self.points[key]) for key in self._smoothed)]
        series = [f"[{places[key]},[{drawn(points[places[key] :])}]]" for key, points in shown]
        floored = ",".join(f"[{step},0]" for step in self.lost[lost_start:])
        return f"ngd.extend({self.chart.id},[{','.join([*series, f'[{lost_start},[{floored}]]'])}]);"

    def _stretch(self) -> str:
        """Returns the script that gives the axis another range, if the new points need one."""
        ranges = self._ranges()
        if ranges == self.ranges:
            return ""
        self.ranges = ranges  # not in the chart's options: NiceGUI would send all of them again
        return f"ngd.merge({self.chart.id},{json.dumps(ranges, separators=(',', ':'))});"

    def _ranges(self) -> dict[str, Any]:
        """The ranges of the axes as ECharts takes them."""
        return {"yAxis": [self._extent()]}

    def _note(self, points: Mapping[str, Points]) -> None:
        """Takes note of what the new points have that the frame must know of."""
        self.lost += sorted({step for values in points.values() for step, value in values if not math.isfinite(value)})
        if self.unit is BYTES:
            parts = [[value for _, value in values] for values in points.values() if values]
            heights = map(sum, zip(*parts, strict=False)) if self.stacked else map(max, parts)
            self.highest = max([self.highest, *heights])

    def _line(self, index: int, key: str) -> dict[str, Any]:
        colour = colour_of(index)
        curve = self._curve(key)
        line: dict[str, Any] = {
            "name": curve.label,
            "type": "line",
            "showSymbol": curve.dotted and len(self.points[key]) <= MOST_SYMBOLS,
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

    def _pale(self, line: dict[str, Any]) -> dict[str, Any]:
        """The points themselves, behind their average."""
        return line | {"lineStyle": line["lineStyle"] | {"width": 1, "opacity": 0.3}, "showSymbol": False, "z": 1}

    def _extent(self) -> dict[str, Any]:
        """The axis's range and ticks, where ECharts would choose others.

        An axis in bytes has about five ticks at multiples of a power of two, and one of values leaves outliers out.
        """
        if self.unit is BYTES:
            highest = max([self.highest, *(goal.value for goal in self.goals)])
            tick = int(2 ** math.ceil(math.log2(max(highest, 5) / 5)))
            return {"interval": tick, "max": tick * max(1, math.ceil(highest / tick))}
        if self.stacked:
            return {}
        if self.unit is SHARE:
            return {"max": 1}
        low, high = self.calm_range or (None, None)
        return {"min": low, "max": high}

    @property
    def _may_have_outliers(self) -> list[str]:
        is_log = self.chart.options["yAxis"][0]["type"] == "log"
        return [] if is_log or self.stacked or self.unit is SHARE else [*self.points]

    def _look_for_outliers(self) -> None:
        """Takes the range of the axis without them; now and then, for it reads all points."""
        values = [self.points[key] for key in self._may_have_outliers] if self.view.ignores_outliers else []
        self.calm_range = range_without_outliers(values)

    def _num_outside(self) -> int:
        if self.calm_range is None:
            return 0
        low, high = self.calm_range
        return sum(not low <= v <= high for of in self.points.values() for _, v in of if math.isfinite(v))

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
            said.append(f"{self._curve(key).label} {self.unit.words(value)} at step {step:,}{trend(values)}")
        outside = self._num_outside()
        said += [f"{counted(outside, 'outlier')} beyond the axis"] if outside else []
        return "; ".join(said)


def colour_of(index: int) -> str:
    """The colour of the series of this index, for light and dark."""
    return f"var(--series-{index % SERIES_COLOURS + 1})"


def not_finite() -> dict[str, Any]:
    """The series of values that have no height; each is a mark at the foot of the chart."""
    mark = {"symbol": "triangle", "symbolSize": 11, "itemStyle": {"color": "var(--bad)"}}
    return {"name": "not finite", "type": "scatter", "yAxisIndex": 1} | mark


def goal_line(goal: Goal, unit: Unit) -> dict[str, Any]:
    """The goal as ECharts draws it, one of the data of a markLine."""
    side = "Bottom" if goal.is_floor else "Top"  # where the curve that has reached it is not
    label = {
        "formatter": f"{goal.label} {unit.words(goal.value)}",
        "position": f"insideEnd{side}",
        "color": MUTED,
        "fontSize": 11,
        "textBorderColor": SURFACE,  # a curve may pass behind the words
        "textBorderWidth": 3,
    }
    style = {"type": "dashed", "color": "var(--good)", "width": 1.5}
    return {"yAxis": goal.value, "label": label, "lineStyle": style}


def drawn(points: Sequence[tuple[float, float]]) -> str:
    """The points as the browser reads them; seven digits are more than a screen has."""
    return ",".join(f"[{step:.12g},{f'{value:.7g}' if math.isfinite(value) else 'null'}]" for step, value in points)


def step_axis(**more: Any) -> dict[str, Any]:
    """The axis of steps."""
    named = axis("step", nameLocation="middle", nameGap=24, minInterval=1, axisPointer=STEP_POINTER)
    return named | {"min": "dataMin", "max": "dataMax"} | more


def value_axis(name: str, unit: Unit, **more: Any) -> dict[str, Any]:
    """A named axis of values in this unit."""
    named = axis(name, nameLocation="middle", nameGap=52, **more)
    named["axisLabel"] = named["axisLabel"] | {":formatter": unit.browser}
    return named
