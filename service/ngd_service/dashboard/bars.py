"""What each job took until its target, as bars beside one another."""

from collections.abc import Callable, Mapping
from typing import Any

from ngd_service.dashboard.chart_panel import INK, LINE, ChartPanel, axis
from ngd_service.dashboard.curves import colour_of

__all__ = ["Bars"]

BAR_PX, FRAME_PX = 44, 56


class Bars(ChartPanel):
    """A bar for each job by its label; a job without a value has its words in place of a bar."""

    def __init__(self, title: str, unit: str, words: Callable[[float], str], num_bars: int) -> None:
        self.words = words
        self.taken: dict[str, float | None] = {}
        options: dict[str, Any] = {
            "animation": False,
            "grid": {"left": 8, "right": 84, "top": 8, "bottom": 30, "containLabel": True},
            "tooltip": {"show": False},  # each bar has its number
            "xAxis": axis(unit, nameLocation="middle", nameGap=26, min=0),
            "yAxis": {
                "type": "category",
                "inverse": True,
                "axisLine": {"lineStyle": {"color": LINE}},
                "axisTick": {"show": False},
                "axisLabel": {"color": INK, "fontSize": 12.5, "width": 150, "overflow": "truncate"},
            },
            "series": [],
        }
        super().__init__(title, options, height_px=FRAME_PX + BAR_PX * num_bars)

    def draw(self, taken: Mapping[str, float | None]) -> None:
        """Shows what each job took; None: it has not reached the target."""
        if taken == self.taken:
            return
        self.taken = dict(taken)
        labels = [label if value is not None else f"{label}\n(not reached)" for label, value in taken.items()]
        bars = [
            {
                "value": value,
                "itemStyle": {"color": colour_of(index)},
                "label": {"formatter": "" if value is None else self.words(value)},
            }
            for index, value in enumerate(taken.values())
        ]
        label = {"show": True, "position": "right", "color": INK, "fontSize": 12.5}
        self.chart.options["yAxis"]["data"] = labels
        self.chart.options["series"] = [{"type": "bar", "barMaxWidth": 20, "label": label, "data": bars}]
        self.chart.update()
        self.describe(now=True)
        self.refill()

    def columns(self) -> list[tuple[str, str]]:
        return [("key", "job"), ("taken", "until the target")]

    def rows(self) -> list[dict[str, Any]]:
        return [{"key": label, "taken": self._told(value)} for label, value in self.taken.items()]

    def sentence(self) -> str:
        return "; ".join(f"{label} {self._told(value)}" for label, value in self.taken.items()) or "No data yet"

    def _told(self, value: float | None) -> str:
        return "not reached" if value is None else self.words(value)
