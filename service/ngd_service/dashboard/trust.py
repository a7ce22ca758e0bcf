"""Whether the curvature can be trusted: the reduction ratio, damping, the update beside the gradient, what failed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ngd_service.client.units import counted, number
from ngd_service.dashboard.curves import QUIET, ZOOM, Curve, Curves, step_axis, value_axis
from ngd_service.dashboard.measures import COUNT, PLAIN
from ngd_service.dashboard.smoothing import Points
from ngd_service.dashboard.view import View

__all__ = ["HEALTHY", "TRUST", "Trust"]

HEALTHY = (0.25, 2.0)  # reduction ratio; see docs/guides/telemetry.md
TRUST = {
    "reduction_ratio": Curve("reduction ratio", dotted=True),
    "damping": Curve("damping"),
    "failed_inversions": Curve("failed inversions"),
    "skipped_steps": Curve("skipped steps"),
    "layers.lowest_cosine": Curve("lowest cosine of gradient and update", dotted=True),
    "layers.kl": Curve("KL of a step", dotted=True),
    "layers.clip_factor": Curve("clip factor", dotted=True),
    "layers.gradient_norm": Curve("gradient norm", dotted=True),
    "layers.update_norm": Curve("update norm", dotted=True),
}
COUNTS = ("failed_inversions", "skipped_steps")
NORMS = ("layers.gradient_norm", "layers.update_norm")
# One above the other, over the same steps.
MEASURED = (("layers.lowest_cosine",), ("layers.kl",), ("layers.clip_factor",))
ROWS = (("reduction_ratio",), ("damping",), *MEASURED, NORMS, COUNTS)
LOGARITHMIC = (("damping",), ("layers.kl",), NORMS)
ROWS_PX, GAP_PX, TOP_PX, FOOT_PX = (110, 110, 80, 80, 56, 80, 56), 22, 34, 44


class Trust(Curves):
    """A row for each of these that the job measures; the marks run through all of them."""

    def __init__(self, view: View) -> None:
        super().__init__("Trust in the curvature", curves=TRUST, view=view, classes="wide")

    def extend(self, points: Mapping[str, Points]) -> str:
        if any(values and not self.points[key] for key, values in points.items()):  # a row more
            return self.replace({key: [*self.points[key], *points.get(key, [])] for key in self.points})
        return super().extend(points)

    def _lay_out(self) -> None:
        """A row without points has no height, but all that it has else: ECharts merges a frame into the last one."""
        options, top = self.chart.options, TOP_PX
        self.ranges = self._ranges()
        places, drawn = [], [any(self.points[key] for key in keys) for keys in ROWS]
        for has_points, height in zip(drawn, ROWS_PX, strict=True):
            places.append({"left": 74, "right": 18, "top": top, "height": height if has_points else 0})
            top += (height + GAP_PX) if has_points else 0
        bottom = max(top - GAP_PX, TOP_PX + ROWS_PX[0])
        options["grid"] = [*places, {"left": 74, "right": 18, "top": TOP_PX, "height": bottom - TOP_PX}]
        hidden = {"name": "", "axisLabel": {"show": False}, "axisTick": {"show": False}}
        last = len(ROWS) - 1
        options["xAxis"] = [
            step_axis(gridIndex=i, show=drawn[i]) | ({} if i == last else hidden) | self._steps()
            for i in range(len(ROWS))
        ]
        whole = {"gridIndex": len(ROWS), "show": False, "axisPointer": {"show": False}}
        options["xAxis"].append(step_axis(**whole) | self._steps())
        options["yAxis"] = [
            axis | {"gridIndex": i, "show": drawn[i]} | extent
            for i, (axis, extent) in enumerate(zip(_axes(), self._extents(), strict=True))
        ]
        options["yAxis"].append({"type": "value", "min": 0, "max": 1, "show": False, "gridIndex": len(ROWS)})
        options["axisPointer"] = {"link": [{"xAxisIndex": "all"}]}
        options["dataZoom"] = [ZOOM | {"xAxisIndex": "all"}]
        row_of = {key: row for row, keys in enumerate(ROWS) for key in keys}
        lines = [
            self._line(index, key) | {"xAxisIndex": row_of[key], "yAxisIndex": row_of[key]} | self._shape(key)
            for index, key in enumerate(self.points)
        ]
        options["series"] = [*lines, self._floor() | {"xAxisIndex": len(ROWS), "yAxisIndex": len(ROWS)}]
        names = [TRUST[key].label for key, values in self.points.items() if values]
        options["legend"] |= {"data": names + (["not finite"] if self.lost else [])}
        self.chart.style(f"height: {bottom + FOOT_PX}px")
        self.chart.update()

    def _shape(self, key: str) -> dict[str, Any]:
        if key in COUNTS:
            return {"step": "end"}
        if key != "reduction_ratio" or not self.points[key]:
            return {}
        label = {"show": True, "position": "insideTopRight", "color": "var(--muted)", "fontSize": 11}
        band = [{"yAxis": HEALTHY[0], "name": "healthy"}, {"yAxis": HEALTHY[1]}]
        style = {"color": "var(--good)", "opacity": 0.12}
        return {"symbolSize": 5, "markArea": {"data": [band], "itemStyle": style, "label": label} | QUIET}

    def _ranges(self) -> dict[str, Any]:
        """All rows show the same steps, though the ratio is not measured in each."""
        return {"xAxis": [self._steps()] * (len(ROWS) + 1), "yAxis": self._extents()}

    def _steps(self) -> dict[str, int]:
        ends = [step for values in self.points.values() if values for step in (values[0][0], values[-1][0])]
        return {"min": min(ends), "max": max(ends)} if ends else {}

    def _extents(self) -> list[dict[str, Any]]:
        """The range of each row's axis: that of the ratio holds its healthy band, a logarithmic one whole decades."""
        extents: list[dict[str, Any]] = []
        for keys in ROWS:
            finite = [value for key in keys for _, value in self.points[key] if math.isfinite(value)]
            if keys == ("reduction_ratio",) and finite:
                low, high = self.calm_range or (min(finite), max(finite))
                extents.append({"min": min(0.0, low), "max": max(HEALTHY[1] + 0.5, high)})
            else:
                extents.append(_decades(finite) if keys in LOGARITHMIC else {})
        return extents

    @property
    def _may_have_outliers(self) -> list[str]:
        return ["reduction_ratio"]

    def _num_outside(self) -> int:
        return 0

    def sentence(self) -> str:
        said = [sentence for sentence in (self._told_of_ratio(), self._told_of_damping()) if sentence]
        for (key,) in MEASURED:
            if self.points[key]:
                said.append(f"{TRUST[key].label} {number(self.points[key][-1][1])}")
        for key, noun in zip(COUNTS, ("failed inversion", "skipped step"), strict=True):
            if self.points[key]:
                said.append(counted(round(self.points[key][-1][1]), noun))
        return "; ".join(said) or "No data yet"

    def _told_of_ratio(self) -> str:
        known: Sequence[tuple[int, float]] = self.points["reduction_ratio"]
        if not known:
            return ""
        inside = sum(HEALTHY[0] <= value <= HEALTHY[1] for _, value in known)
        within = f"{HEALTHY[0]:g} to {HEALTHY[1]:g}"
        return f"reduction ratio {number(known[-1][1])}; within {within} at {inside:,} of {len(known):,} points"

    def _told_of_damping(self) -> str:
        known = self.points["damping"]
        return f"damping {number(known[-1][1])}" if known else ""


def _decades(values: Sequence[float]) -> dict[str, float]:
    """Returns the least range of powers of ten that holds the values; ECharts' own begins at 1.

    >>> _decades([0.003, 0.02])
    {'min': 0.001, 'max': 0.1}
    >>> _decades([0.001])
    {'min': 0.0001, 'max': 0.01}
    """
    exponents = [math.log10(value) for value in values if value > 0]
    if not exponents:
        return {}
    low, high = math.floor(min(exponents)), math.ceil(max(exponents))
    room = int(low == high)  # a line in the middle
    return {"min": 10.0 ** (low - room), "max": 10.0 ** (high + room)}


def _axes() -> list[dict[str, Any]]:
    """Returns the axis of each row."""
    return [
        value_axis("ratio", PLAIN, splitNumber=3),
        value_axis("damping", PLAIN, splitNumber=3) | {"type": "log"},
        value_axis("cosine", PLAIN, splitNumber=2, max=1),
        value_axis("KL", PLAIN, splitNumber=2) | {"type": "log"},
        value_axis("factor", PLAIN, splitNumber=2, min=0, max=1),
        value_axis("norm", PLAIN, splitNumber=2) | {"type": "log"},
        value_axis("so far", COUNT, minInterval=1, min=0),
    ]
