"""The staleness heat map: one row a statistic, one column a span of steps, colour the age of the statistic in use."""

import json
from collections.abc import Sequence
from typing import Any

from service.dashboard.chart_panel import MUTED, NO_DATA, TOOLTIP, ChartPanel, axis
from service.dashboard.units import number
from service.resources import Statistics

__all__ = ["MAX_CELLS", "HeatMap", "columns_for"]

# One SVG node a cell: above this a redraw takes longer than the second between two of them.
MAX_CELLS = 6_000
MAX_COLUMNS = 160
ROW_PX = 20
FRAME_PX = 96
VIRIDIS = ["#fde725", "#a0da39", "#4ac16d", "#1fa187", "#277f8e", "#365c8d", "#46327e", "#440154"]
CELL_TEXT = (
    "p => {{ const [x, y, age, interval, refreshes] = p.data; return {names}[y] + ', step ' + p.name + '\\n' + "
    "(age ? 'measured ' + age + ' steps ago' : 'measured in this step') + '\\ninterval ' + interval + "
    "(interval === 1 ? ' step' : ' steps') + (refreshes ? '\\nrefreshed ' + refreshes + ' times here' : ''); }}"
)


class HeatMap(ChartPanel):
    """Ages of all statistics over the run. A dot marks a refresh of a statistic that may rest longer than a step."""

    def __init__(self, title: str) -> None:
        self.statistics: Statistics | None = None
        super().__init__(title, _options(), classes="wide", height_px=FRAME_PX + 4 * ROW_PX)

    def replace(self, statistics: Statistics) -> None:
        """Draws these statistics instead of those that were there."""
        if not statistics.names or not statistics.steps:
            return
        self.statistics = statistics
        options = self.chart.options
        options["title"]["show"] = False
        options["tooltip"][":formatter"] = CELL_TEXT.format(names=json.dumps(statistics.names))
        options["xAxis"]["data"] = [f"{step:,}" for step in statistics.steps]
        options["yAxis"]["data"] = statistics.names
        options["grid"]["left"] = min(260, 24 + 7 * max(map(len, statistics.names)))
        options["visualMap"]["max"] = max(1, *map(max, statistics.ages))
        cells, dots = _cells(statistics)
        options["series"][0]["data"], options["series"][1]["data"] = cells, dots
        self.chart.style(f"height: {FRAME_PX + ROW_PX * len(statistics.names)}px")
        self.chart.update()
        self.describe(_sentence(statistics))

    def explain(self, why: str) -> None:
        """Says why there is no map."""
        self.describe(why)
        self.chart.set_visibility(False)
        self.toggle.set_visibility(False)

    def columns(self) -> list[tuple[str, str]]:
        return [
            ("key", "statistic"),
            ("age", "age, steps"),
            ("interval", "interval, steps"),
            ("refreshes", "refreshes"),
            ("mean", "steps per refresh"),
        ]

    def rows(self) -> list[dict[str, Any]]:
        if self.statistics is None:
            return []
        known = self.statistics
        totals = map(sum, known.refreshes)
        rows = zip(known.names, known.ages, known.intervals, totals, strict=True)
        return [
            {
                "key": name,
                "age": ages[-1],
                "interval": intervals[-1],
                "refreshes": total,
                "mean": number(known.last_step / total) if total else None,
            }
            for name, ages, intervals, total in rows
        ]


def columns_for(rows: int) -> int:
    """How many columns a map of so many rows may have."""
    return max(20, min(MAX_COLUMNS, MAX_CELLS // max(1, rows)))


def _cells(known: Statistics) -> tuple[list[list[int]], list[list[int]]]:
    cells, dots = [], []
    for y, (ages, intervals, refreshes) in enumerate(zip(known.ages, known.intervals, known.refreshes, strict=True)):
        for x, (age, interval, count) in enumerate(zip(ages, intervals, refreshes, strict=True)):
            cells.append([x, y, age, interval, count])
            if count and interval > 1:
                dots.append([x, y, age, interval, count])
    return cells, dots


def _sentence(known: Statistics) -> str:
    refreshed = sum(map(sum, known.refreshes))
    possible = len(known.names) * known.last_step
    longest = max(row[-1] for row in known.intervals)
    return (
        f"{refreshed:,} of {possible:,} possible refreshes done ({100 * refreshed / possible:.1f}%); "
        f"longest interval now {_steps(longest)}"
    )


def _steps(count: int) -> str:
    return f"{count:,} step" + ("" if count == 1 else "s")


def _category(name: str, data: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    plain = axis(name, type="category", data=list(data), splitLine={"show": False})
    return plain | {"axisTick": {"show": False}} | more


def _options() -> dict[str, Any]:
    return {
        "animation": False,
        "title": dict(NO_DATA),
        "grid": {"left": 120, "right": 18, "top": 40, "bottom": 46},
        "tooltip": TOOLTIP | {"renderMode": "richText"},
        "visualMap": {
            "type": "continuous",
            "seriesIndex": 0,
            "dimension": 2,
            "min": 0,
            "max": 1,
            "precision": 0,
            "orient": "horizontal",
            "left": 0,
            "top": 0,
            "itemWidth": 12,
            "itemHeight": 130,
            "text": ["steps old", "0"],
            "textStyle": {"color": MUTED},
            "inRange": {"color": VIRIDIS},
        },
        "xAxis": _category("step", nameLocation="middle", nameGap=28),
        "yAxis": _category("", inverse=True),
        "series": [
            {"name": "age", "type": "heatmap", "data": [], "emphasis": {"disabled": True}},
            {
                "name": "refresh",
                "type": "scatter",
                "symbol": "circle",
                "symbolSize": 4,
                "silent": True,
                "itemStyle": {"color": "#ffffff", "borderColor": "#000000", "borderWidth": 0.8},
                "data": [],
            },
        ],
    }
