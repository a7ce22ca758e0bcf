"""The staleness heat map: one row a statistic, one column a span of steps, colour the age of the statistic in use."""

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from nicegui import ui
from nicegui.events import ValueChangeEventArguments

from ngd_service.client.client import AsyncClient
from ngd_service.client.units import number
from ngd_service.dashboard.chart_panel import MUTED, TOOLTIP, ChartPanel, axis
from ngd_service.dashboard.view import View
from ngd_service.resources import Statistics

__all__ = ["COLOURS", "MAX_CELLS", "HeatMap", "columns_for", "span_for"]

# One SVG node a cell: above this a redraw takes longer than the second between two of them.
MAX_CELLS = 6_000
MAX_COLUMNS = 160
CELLS_PER_STEP = 64  # that a running job adds: some 400 bytes
ROW_PX = 20
FRAME_PX = 96
VIRIDIS = ["#fde725", "#a0da39", "#4ac16d", "#1fa187", "#277f8e", "#365c8d", "#46327e", "#440154"]
AGE, TITLE = "age", "Statistics in use"
COLOURS = {  # by the number that colours a cell: its name in the switch, its field, and what the scale says
    AGE: ("Age", "ages", "steps old"),
    "change": ("Change", "changes", "relative change"),
    "noise": ("Noise", "noises", "noise"),
    "threshold": ("Threshold", "thresholds", "threshold"),
    "error": ("Error", "errors", "error of the inverse"),
}
CELL_TEXT = (
    "p => {{ const [x, y, shown, interval, refreshes, age, ...why] = p.data, told = {told}; "
    "return {names}[y] + ', step ' + p.name + '\\n' + "
    "(age ? 'measured ' + age + ' steps ago' : 'measured in this step') + '\\ninterval ' + interval + "
    "(interval === 1 ? ' step' : ' steps') + (refreshes ? '\\nrefreshed ' + refreshes + ' times here' : '') + "
    "told.map((name, i) => why[i] == null ? '' : '\\n' + name + ' ' + why[i]).join(''); }}"
)


class HeatMap(ChartPanel):
    """Ages of all statistics over the run, or the numbers that decided on them, which the switch chooses.

    A dot marks a refresh of a statistic that may rest longer than a step. A column without a decision is left blank.
    The whole run is kept, and of the steps that the reader has zoomed to the finer columns that are shown in its place.
    """

    def __init__(self, view: View) -> None:
        self.view = view
        self.on_recolour: Callable[[], Awaitable[None]] | None = None
        self.is_stale = False  # the reader has chosen another colour since the last read
        self.statistics: Statistics | None = None
        self.fine: Statistics | None = None  # of the steps in view; None: the whole run's are as fine
        self.complete_until = 0  # columns up to this step hold all of their steps
        self.num_rows = 1
        super().__init__(TITLE, _options(), classes="wide", height_px=FRAME_PX + 4 * ROW_PX)
        self.view.colour = view.colour if view.colour in COLOURS else AGE
        with self.head:
            names = {colour: name for colour, (name, _, _) in COLOURS.items()}
            self.switch = ui.toggle(names, value=view.colour, on_change=self._recolour)
            self.switch.props('dense unelevated no-caps toggle-color=primary aria-label="Colour by"').classes("switch")
            self.switch.move(target_index=2)

    async def refresh(self, api: AsyncClient, job_id: str, step: int, *, whole: bool) -> None:
        """Fetches and draws the columns that are complete by this step, which the job is at; all if `whole`."""
        known = self.statistics
        if known is None or whole or self.is_stale:
            await self._replace(api, job_id, step)
        elif step >= self.complete_until + known.span:
            most, after = columns_for(self.num_rows), self.complete_until
            new = await self._read(api, job_id, known.span, most, from_step=after + 1)
            start = sum(end <= after for end in known.steps)
            complete = [i for i, end in enumerate(new.steps) if _last_of(end, new.span) <= step]
            if new.span != known.span or new.names != known.names or start + len(complete) > most:
                await self._replace(api, job_id, step)
            elif complete:
                self.extend(new, start, complete)
                self.complete_until = step // known.span * known.span
        if self.fine is not None and self._has_outgrown(self.fine, step):
            await self.refine(api, job_id)

    async def refine(self, api: AsyncClient, job_id: str) -> None:
        """Shows the steps in view as finely as there is room for; all of them, or a view that moves, as they are."""
        known, window, finest = self.statistics, self.view.window, span_for(self.num_rows)
        fine = None
        if known is not None and known.span > finest and window is not None and not self.view.follows:
            most, (first, last) = columns_for(self.num_rows), window
            fine = await self._read(api, job_id, finest, most, from_step=first, to_step=last)
            fine = fine if fine.span < known.span and fine.steps and fine.names == known.names else None
        if fine is not None or self.fine is not None:
            self.fine = fine
            self._draw()

    def _has_outgrown(self, fine: Statistics, step: int) -> bool:
        """Whether the view moves, or the job has done another of its columns."""
        window = self.view.window
        return window is None or self.view.follows or min(window[1], step) >= fine.last_step + fine.span

    async def _replace(self, api: AsyncClient, job_id: str, step: int) -> None:
        most, span = columns_for(self.num_rows), span_for(self.num_rows)
        self.is_stale = False
        new = await self._read(api, job_id, span, most)
        _keep(new, sum(_last_of(end, new.span) - new.span < step for end in new.steps))
        self.replace(new)
        self.complete_until = step // new.span * new.span
        await self.refine(api, job_id)

    async def _read(
        self, api: AsyncClient, job_id: str, span: int, most: int, *, from_step: int = 1, to_step: int | None = None
    ) -> Statistics:
        is_judged = self.view.colour != AGE
        return await api.statistics(
            job_id, from_step=from_step, to_step=to_step, max_points=most, span=span, judged=is_judged
        )

    async def _recolour(self, event: ValueChangeEventArguments[Any]) -> None:
        self.view.colour, self.is_stale = str(event.value), True
        self.tell(self.view.script)
        if self.on_recolour is not None:
            await self.on_recolour()

    def cut(self, last_step: int) -> None:
        """Takes the columns away that hold steps after this one."""
        if self.statistics is not None:
            start = sum(end <= last_step for end in self.statistics.steps)
            _keep(self.statistics, start)
            self.complete_until = last_step // self.statistics.span * self.statistics.span
            if self.fine is None:
                self.tell(f"ngd.columns({self.chart.id},{start},[])")
            else:
                self.fine = None
                self._draw()
            if not start:
                self.statistics = None

    def replace(self, statistics: Statistics) -> None:
        """Draws these statistics instead of those that were there."""
        if not statistics.names or not statistics.steps:
            return
        self.statistics, self.fine = statistics, None
        self._draw()
        self.describe(now=True)
        self.refill()

    def _draw(self) -> None:
        """Draws all columns that are to be shown."""
        statistics = self.fine or self.statistics
        assert statistics is not None
        options = self.chart.options
        told = json.dumps([name.lower() for name, _, _ in list(COLOURS.values())[1:]])
        options["tooltip"][":formatter"] = CELL_TEXT.format(names=json.dumps(statistics.names), told=told)
        options["visualMap"] |= _scale(self.view.colour)
        options["yAxis"]["data"] = statistics.names
        options["grid"]["left"] = min(260, 24 + 7 * max(map(len, statistics.names)))
        self.chart.style(f"height: {FRAME_PX + ROW_PX * len(statistics.names)}px")
        self.chart.update()
        self.tell(self._script(statistics, 0, range(len(statistics.steps))))

    def extend(self, new: Statistics, start: int, columns: Sequence[int]) -> None:
        """Puts these columns of new statistics in place of those from `start` on."""
        assert self.statistics is not None
        _keep(self.statistics, start)
        if self.fine is None:
            self.tell(self._script(new, start, columns))
        self.statistics.steps += [new.steps[i] for i in columns]
        for known, added in zip(_matrices(self.statistics), _matrices(new), strict=False):
            for row, more in zip(known, added, strict=True):
                row += [more[i] for i in columns]
        self.statistics.last_step = new.last_step
        self.describe(now=False)

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
                "mean": number(known.steps[-1] / total) if total else None,
            }
            for name, ages, intervals, total in rows
        ]

    def sentence(self) -> str:
        known = self.statistics
        if known is None:
            return "No data yet"
        if self.view.colour != AGE and known.judged is None:
            return "These workers tell no changes: the intervals are fixed, or their version is an earlier one"
        refreshed, last = sum(map(sum, known.refreshes)), known.steps[-1]
        possible = len(known.names) * last
        longest = max(row[-1] for row in known.intervals)
        return (
            f"{refreshed:,} of {possible:,} possible refreshes done ({100 * refreshed / possible:.1f}%) "
            f"by step {last:,}; longest interval then {_steps(longest)}"
        )

    def _script(self, statistics: Statistics, start: int, columns: Sequence[int]) -> str:
        matrices = _matrices(statistics)
        added = [[f"{statistics.steps[i]:,}", *([row[i] for row in rows] for rows in matrices)] for i in columns]
        shown = list(COLOURS).index(self.view.colour) + 2 if self.view.colour != AGE else 0  # 0, 1, 2 are the ages'
        return f"ngd.columns({self.chart.id},{start},{json.dumps(added, separators=(',', ':'))},{shown})"


def _matrices(statistics: Statistics) -> list[list[list[Any]]]:
    """The matrices as the browser gets them: ages, intervals and refreshes, then the reasons, if they were read."""
    why = statistics.judged
    judged = [] if why is None else [getattr(why, field) for _, field, _ in list(COLOURS.values())[1:]]
    return [statistics.ages, statistics.intervals, statistics.refreshes, *judged]


def _scale(colour: str) -> dict[str, Any]:
    """The colours' scale: of ages linear, of numbers of any size by their logarithm."""
    text = COLOURS[colour][2]
    if colour == AGE:
        return {"text": [text, ""], ":formatter": "v => Math.round(v)"}
    return {"text": [text, ""], ":formatter": "v => +(10 ** v).toPrecision(2)"}


def span_for(rows: int) -> int:
    """How many steps a column of so many rows has at least."""
    return max(1, 1 << (-(-rows // CELLS_PER_STEP) - 1).bit_length())


def columns_for(rows: int) -> int:
    """How many columns a map of so many rows may have."""
    return max(20, min(MAX_COLUMNS, MAX_CELLS // max(1, rows)))


def _keep(known: Statistics, num_columns: int) -> None:
    del known.steps[num_columns:]
    for matrix in _matrices(known):
        for row in matrix:
            del row[num_columns:]


def _last_of(step: int, span: int) -> int:
    """The last step of the column that holds this one."""
    return -(-step // span) * span


def _steps(count: int) -> str:
    return f"{count:,} step" + ("" if count == 1 else "s")


def _category(name: str, **more: Any) -> dict[str, Any]:
    plain = axis(name, type="category", splitLine={"show": False})
    return plain | {"axisTick": {"show": False}} | more


def _options() -> dict[str, Any]:
    """Returns the frame, which says nothing of the data: it may be laid out after them, and must leave them."""
    return {
        "animation": False,
        "grid": {"left": 120, "right": 18, "top": 40, "bottom": 46},
        "tooltip": TOOLTIP | {"renderMode": "richText"},
        "visualMap": {
            "type": "continuous",
            "seriesIndex": 0,
            "dimension": 2,
            "min": 0,
            "max": 1,
            "precision": 2,
            "calculable": False,
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
            {"name": "age", "type": "heatmap", "emphasis": {"disabled": True}},
            {
                "name": "refresh",
                "type": "scatter",
                "symbol": "circle",
                "symbolSize": 4,
                "silent": True,
                "itemStyle": {"color": "#ffffff", "borderColor": "#000000", "borderWidth": 0.8},
            },
        ],
    }
