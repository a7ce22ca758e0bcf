"""Curves of several jobs over one another: each as it was measured, and over it, smoothed, its moving average."""

import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ngd_service.client.client import AsyncClient
from ngd_service.client.comparison import Goal as Target
from ngd_service.client.comparison import History
from ngd_service.dashboard.chart_panel import MUTED, TOOLTIP, ChartPanel, axis
from ngd_service.dashboard.curves import (
    DASHES,
    LEGEND,
    QUIET,
    Goal,
    colour_of,
    drawn,
    goal_line,
    not_finite,
    value_axis,
)
from ngd_service.dashboard.measures import SHARE, Unit
from ngd_service.dashboard.smoothing import smoothed
from ngd_service.resources import Job

__all__ = ["AXES", "Overlay", "Run", "View", "connect"]

AXES = {"step": "step", "epoch": "epoch", "samples": "samples seen", "seconds": "seconds since the workers started"}
MAX_POINTS = 1_000
MOST_SMOOTHING = 0.98
PLACES = ("epoch", "time_s")  # curves that say where a step lies on the other axes
TOOLBOX = {
    "right": 0,
    "top": -4,
    "itemSize": 14,
    "iconStyle": {"borderColor": MUTED},
    "emphasis": {"iconStyle": {"textFill": MUTED}},
    "feature": {"dataZoom": {"yAxisIndex": "none", "title": {"zoom": "Zoom", "back": "Zoom back"}}},
}
ROUND = "v => (+(+v).toPrecision(4)).toLocaleString('en-US')"
TOLD = (
    "ps => ps.map(p => p.marker + p.seriesName + (p.seriesIndex % 2 ? ' ' : ', smoothed ') + '<b>' + "
    "({unit})(p.value[1]) + '</b> at {axis} ' + +p.value[0].toPrecision(4)).join('<br>')"
)


@dataclass(frozen=True, slots=True)
class View:
    """What the reader has chosen. The address of the page keeps it."""

    x: str = "step"
    smoothing: float = 0.6
    log: str = ""  # of "x" and "y" those that are logarithmic

    @classmethod
    def of(cls, query: Mapping[str, str]) -> "View":
        """Returns the view of an address; what is not one of our own words counts as left out."""
        try:
            smoothing = min(max(float(query.get("smooth", cls().smoothing)), 0.0), MOST_SMOOTHING)
        except ValueError:
            smoothing = math.nan
        x = query.get("x", "step")
        return cls(
            x=x if x in AXES else "step",
            smoothing=cls().smoothing if math.isnan(smoothing) else smoothing,
            log="".join(one for one in "xy" if one in query.get("log", "")),
        )

    def query(self) -> str:
        """Returns the view as parts of an address, without what is the default."""
        parts = {"x": self.x, "smooth": f"{self.smoothing:g}", "log": self.log}
        defaults = {"x": View().x, "smooth": f"{View().smoothing:g}", "log": ""}
        return "".join(f"&{name}={value}" for name, value in parts.items() if value != defaults[name])


@dataclass(slots=True)
class Run:
    """One of the compared jobs, as it was read last."""

    job: Job
    label: str
    index: int
    history: History = field(default_factory=History)
    points: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    last_step: int | None = None

    async def refresh(self, api: AsyncClient, names: Sequence[str]) -> bool:
        """Reads what is new of the job; returns whether anything is."""
        if self.last_step is not None:
            if self.job.status.is_terminal:
                return False
            job = await api.get(self.job.id)
            if job.resource_version == self.job.resource_version:
                return False
            self.job = job
        starts = self.history.num_starts
        self.history = await api.history(self.job.id, None if self.last_step is None else self.history)
        # Steps that are done again take the place of those that were there.
        is_whole = self.history.num_starts != starts or self._is_crowded() or self.job.status.is_terminal
        from_step = 0 if is_whole or self.last_step is None else self.last_step
        known = await api.metrics(
            self.job.id, names=[*names, *PLACES], from_step=from_step, to_step=None, max_points=MAX_POINTS
        )
        for name, series in known.series.items():
            kept = [one for one in self.points.get(name, []) if one[0] < from_step]
            self.points[name] = [*kept, *zip(series.steps, series.values, strict=True)]
        self.last_step = known.last_step
        return True

    def place(self, by: str, step: int) -> float | None:
        """Returns where the step lies on an axis; None: nobody knows.

        Of a long job the API tells the first and last step of each span, and steps within one lie between these.
        """
        if by == "step":
            return step
        if by == "samples":
            batch = self.job.spec.get("batch")
            return None if batch is None else step * int(batch["global_size"])
        value = between(self.points.get("epoch" if by == "epoch" else "time_s", []), step)
        if by == "epoch" or value is None:
            return value
        start = self.history.started_at
        return None if start is None else value - start.timestamp()

    def _is_crowded(self) -> bool:
        return any(len(points) > 2 * MAX_POINTS for points in self.points.values())


class Overlay(ChartPanel):
    """One of the series of all jobs, by the axis that the reader has chosen."""

    def __init__(self, title: str, name: str, unit: Unit, runs: Sequence[Run], goals: Sequence[Target]) -> None:
        self.name = name
        self.unit = unit
        self.runs = runs
        self.view = View()
        self.is_test = name.startswith("test_")
        self.goals = [Goal(goal.value, is_floor=goal.better == "higher") for goal in goals]
        self.sent: list[list[tuple[float, float]]] = []
        floor = {"type": "value", "min": 0, "max": 1, "show": False}
        options: dict[str, Any] = {
            "animation": False,
            "grid": {"left": 74, "right": 20, "top": 36, "bottom": 42},
            "legend": LEGEND | {"right": 56, "data": [run.label for run in runs]},
            "toolbox": TOOLBOX,
            "tooltip": TOOLTIP | {"trigger": "axis"},
            "dataZoom": [{"type": "inside", "zoomOnMouseWheel": "ctrl", "moveOnMouseMove": "shift"}],
            "xAxis": axis("step", nameLocation="middle", nameGap=26, max="dataMax"),
            "yAxis": [value_axis(unit.name or title.lower(), unit, scale=True), floor],
            "series": [],
        }
        options["xAxis"]["axisLabel"] = options["xAxis"]["axisLabel"] | {":formatter": ROUND}
        super().__init__(title, options, height_px=290)
        self._lay_out()

    def draw(self, view: View) -> str:
        """Returns the script that brings the chart up to date: new points alone, unless the view is another one."""
        if view != self.view:
            self.view, self.sent = view, []
        lines: list[list[tuple[float, float]]] = []
        lost: list[tuple[float, float]] = []
        for run in self.runs:
            raw = self._points(run, view)
            lost += [(x, 0.0) for x, value in raw if not math.isfinite(value)]
            lines += [smoothed(raw, self._smoothing) if self._smoothing else [], raw]
        if not self.sent or self._is_log_y(lines) != (self.chart.options["yAxis"][0]["type"] == "log"):
            self._lay_out(lines)
        lines.append(sorted(lost))
        before = self.sent or [[] for _ in lines]
        added = [_news(old, new) for old, new in zip(before, lines, strict=True)]
        self.sent = lines
        self.describe(now=True)
        self.refill()
        self.show(is_needed=any(lines))
        if not any(points for _, points in added) and before == lines:
            return ""
        series = ",".join(f"[{start},[{drawn(points)}]]" for start, points in added)
        return f"ngd.extend({self.chart.id},[{series}]);"

    def columns(self) -> list[tuple[str, str]]:
        return [("key", "step"), *((str(run.index), run.label) for run in self.runs)]

    def rows(self) -> list[dict[str, Any]]:
        by_step: dict[int, dict[str, Any]] = {}
        for run in self.runs:
            for step, value in run.points.get(self.name, []):
                words = self.unit.words(value) if math.isfinite(value) else "not finite"
                by_step.setdefault(step, {"key": step})[str(run.index)] = words
        return [by_step[step] for step in sorted(by_step, reverse=True)]

    def sentence(self) -> str:
        last = {run.label: run.points[self.name][-1] for run in self.runs if run.points.get(self.name)}
        said = "; ".join(f"{label} {self.unit.words(value)} at step {step:,}" for label, (step, value) in last.items())
        homeless = [run.label for run in self.runs if run.label in last and not self._points(run, self.view)]
        if homeless:
            said += f"; it is not known where {', '.join(homeless)} lies on this axis"
        if "y" in self.view.log and self.chart.options["yAxis"][0]["type"] == "value":
            why = "it is of shares" if self.unit is SHARE else "not all values are above 0"
            said += f"; the axis is linear, since {why}"
        return said or "No data yet"

    @property
    def _smoothing(self) -> float:
        return 0.0 if self.is_test else self.view.smoothing

    def _points(self, run: Run, view: View) -> list[tuple[float, float]]:
        placed = ((run.place(view.x, step), value) for step, value in run.points.get(self.name, []))
        return [(x, value) for x, value in placed if x is not None and (x > 0 or "x" not in view.log)]

    def _is_log_y(self, lines: Sequence[Sequence[tuple[float, float]]]) -> bool:
        above = all(value > 0 for line in lines for _, value in line if math.isfinite(value))
        return "y" in self.view.log and self.unit is not SHARE and above

    def _lay_out(self, lines: Sequence[Sequence[tuple[float, float]]] = ()) -> None:
        options, view = self.chart.options, self.view
        options["xAxis"] |= {"name": AXES[view.x], "type": "log" if "x" in view.log else "value"}
        options["xAxis"]["min"] = "dataMin" if view.x == "step" or "x" in view.log else 0
        options["yAxis"][0]["type"] = "log" if self._is_log_y(lines) else "value"
        options["tooltip"][":formatter"] = TOLD.replace("{unit}", self.unit.browser).replace("{axis}", view.x)
        options["series"] = [line for run in self.runs for line in self._lines(run)]
        if self.goals:
            options["series"][0]["markLine"] = {"data": [goal_line(goal, self.unit) for goal in self.goals]} | QUIET
        options["series"].append(not_finite())
        self.chart.update()

    def _lines(self, run: Run) -> list[dict[str, Any]]:
        """Returns the line of the average, which the legend shows, and that of what was measured: it switches both."""
        colour, is_smooth = colour_of(run.index), self._smoothing > 0
        line = {
            "name": run.label,
            "type": "line",
            "symbol": "circle",
            "symbolSize": 5,
            "showSymbol": self.is_test,
            "itemStyle": {"color": colour},
            "emphasis": {"disabled": True},
        }
        style = {"color": colour, "width": 1.75, "type": DASHES[run.index % len(DASHES)]}
        pale = style | {"width": 1, "type": "solid", "opacity": 0.3} if is_smooth else style
        return [line | {"lineStyle": style, "showSymbol": False}, line | {"lineStyle": {"opacity": 1} | pale, "z": 1}]


def between(points: Sequence[tuple[int, float]], step: int) -> float | None:
    """Returns the value at this step, on the straight line between its neighbours; None: it is beyond the ends."""
    at = bisect_left(points, step, key=lambda one: one[0])
    if at == len(points):
        return None
    after, value = points[at]
    if after == step:
        return value
    if at == 0:
        return None
    before, start = points[at - 1]
    return start + (value - start) * (step - before) / (after - before)


def connect(charts: Sequence[Overlay]) -> str:
    """Returns the script that has the charts share cursor, zoom and hidden jobs."""
    return f"ngd.connect({json.dumps([chart.chart.id for chart in charts])})"


def _news(
    old: Sequence[tuple[float, float]], new: Sequence[tuple[float, float]]
) -> tuple[int, Sequence[tuple[float, float]]]:
    """Returns from where on the browser's points are others, and those."""
    same = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    return same, new[same:]
