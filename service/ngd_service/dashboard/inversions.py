"""How each factor was inverted last, and the ranks' seconds of it beside those of another placement."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from nicegui import ui

from ngd_dist.cost.placement import least_loaded
from ngd_service.client.units import NOTHING, counted, number
from ngd_service.dashboard.chart_panel import INK, LINE, MUTED, TOOLTIP, axis
from ngd_service.dashboard.measures import SECONDS
from ngd_service.dashboard.theme import panel
from ngd_service.resources import Anatomy, FactorInversion

__all__ = ["InversionsPanel", "seconds_by_rank"]

COLUMNS = (
    ("name", "factor"),
    ("owner", "inverted on"),
    ("method", "method"),
    ("residual", "residual"),
    ("seconds", "time"),
    ("step", "step"),
    ("ending", "ending"),
)
NUMBERS = ("residual", "seconds", "step")
METHODS = {
    "RECIPROCAL": "reciprocal",
    "WARM_NEWTON_SCHULZ": "Newton-Schulz from the old inverse",
    "NEWTON_SCHULZ": "Newton-Schulz",
    "CHOLESKY": "Cholesky",
    "CHOLESKY_FLOAT64": "Cholesky in float64",
    "WOODBURY": "Woodbury",
    "EIGENDECOMPOSITION": "eigendecomposition",
}
ENDING = """<q-td :props="props">
  <span v-if="props.value === 'OK'">OK</span>
  <span v-else class="phase FAILED"><q-icon name="error" aria-hidden="true" />failed: {{ props.value }}</span>
</q-td>"""
PLACED, REPLACED = "as placed", "if placed by these times"


class InversionsPanel:
    """A row for each factor, failures and then the largest residual first; of several ranks also a bar for each."""

    def __init__(self) -> None:
        self.known: dict[str, FactorInversion] = {}
        self.world_size = 1
        with panel("Inversions", "wide"):
            self.whole = ui.context.slot.parent
            self.note = ui.label().classes("panel-note digits")
            columns = [
                {"name": key, "label": label, "field": key, "align": "right" if key in NUMBERS else "left"}
                for key, label in COLUMNS
            ]
            with ui.element("div").classes("panel-body"):
                with ui.element("div").props("role=img") as self.figure:
                    self.chart = ui.echart(_options(), renderer="svg").classes("chart").style("height: 200px")
                self.table = ui.table(rows=[], columns=columns, row_key="name", pagination=10).classes("dense fill")
                self.table.props('flat dense aria-label="Inversions"').add_slot("body-cell-ending", ENDING)
        self.figure.props(f'aria-label="Time of inverting by rank" aria-describedby={self.note.html_id}')
        self.whole.set_visibility(False)

    def show(self, told: Anatomy) -> None:
        """Takes the newest that was told; a factor that was not inverted since stays as it is."""
        if told.world_size != self.world_size:  # the owners are others
            self.world_size, self.known = told.world_size, {}
        self.known |= {one.name: one for one in told.inversions}
        self.whole.set_visibility(bool(self.known))
        if not told.inversions:
            return
        known = [*self.known.values()]
        self.table.rows = inversion_rows(known)
        self.note.set_text(self._sentence(known))
        self.figure.set_visibility(self.world_size > 1)
        if self.world_size > 1:
            self.chart.options["xAxis"]["data"] = [f"rank {rank}" for rank in range(self.world_size)]
            bars = zip(self.chart.options["series"], seconds_by_rank(known, self.world_size), strict=True)
            for series, seconds in bars:
                series["data"] = seconds
            self.chart.update()

    def _sentence(self, known: Sequence[FactorInversion]) -> str:
        measured = [one for one in known if one.residual is not None]
        failed = sum(one.ending != "OK" for one in known)
        said = [counted(len(known), "factor") + (f", {failed:,} failed" if failed else "")]
        if measured:
            worst = max(measured, key=lambda one: one.residual or 0.0)
            said.append(f"largest residual {number(worst.residual)}, of {worst.name}")
        if self.world_size > 1:
            said.append(_said_of_placement(*seconds_by_rank(known, self.world_size)))
        return "; ".join(said)


def seconds_by_rank(known: Sequence[FactorInversion], world_size: int) -> tuple[list[float], list[float]]:
    """Returns each rank's seconds of inverting: as the layers are placed, and if they were placed by these seconds.

    The latter gives the layer that takes longest to the rank that has least to do, then the next. The factors of a
    layer stay together, and those that every rank inverts take their seconds on each.
    """
    everywhere = math.fsum(one.seconds or 0.0 for one in known if one.owner is None)
    placed, replaced = [everywhere] * world_size, [everywhere] * world_size
    of_layer: dict[str, float] = defaultdict(float)
    for one in known:
        if one.owner is not None:
            placed[one.owner] += one.seconds or 0.0
            of_layer[one.name.rpartition(".")[0]] += one.seconds or 0.0
    least_loaded(of_layer, replaced)
    return placed, replaced


def inversion_rows(known: Sequence[FactorInversion]) -> list[dict[str, Any]]:
    """Returns the table's rows: failures first, then by residual, those without one last."""
    in_order = sorted(known, key=lambda one: (one.ending == "OK", math.inf if one.residual is None else -one.residual))
    return [
        {
            "name": one.name,
            "owner": "every rank" if one.owner is None else f"rank {one.owner}",
            "method": NOTHING if one.method is None else METHODS.get(one.method, one.method),
            "residual": number(one.residual),
            "seconds": NOTHING if one.seconds is None else SECONDS.words(one.seconds),
            "step": f"{one.step:,}",
            "ending": one.ending,
        }
        for one in in_order
    ]


def _said_of_placement(placed: Sequence[float], replaced: Sequence[float]) -> str:
    busiest, mean = max(range(len(placed)), key=placed.__getitem__), math.fsum(placed) / len(placed)
    return (
        f"rank {busiest} inverts longest, {SECONDS.words(placed[busiest])}; if layers were placed by these times, "
        f"longest first, the busiest rank would take {SECONDS.words(max(replaced))}; mean {SECONDS.words(mean)}; "
        "measured at each factor's newest refresh"
    )


def _options() -> dict[str, Any]:
    seconds = axis("")  # its labels have the unit
    seconds["axisLabel"] |= {":formatter": SECONDS.browser}
    return {
        "animation": False,
        "grid": {"left": 64, "right": 18, "top": 40, "bottom": 28},
        "legend": {"top": 0, "left": 0, "textStyle": {"color": MUTED, "fontSize": 12}},
        "tooltip": TOOLTIP | {"trigger": "axis", ":valueFormatter": SECONDS.browser},
        "xAxis": {
            "type": "category",
            "axisLine": {"lineStyle": {"color": LINE}},
            "axisTick": {"show": False},
            "axisLabel": {"color": INK, "fontSize": 12, "hideOverlap": True},
            "data": [],
        },
        "yAxis": seconds,
        "series": [
            {"name": name, "type": "bar", "barMaxWidth": 28, "itemStyle": {"color": colour}, "data": []}
            for name, colour in ((PLACED, "var(--series-1)"), (REPLACED, "var(--series-2)"))
        ],
    }
