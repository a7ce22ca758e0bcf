"""Each layer's gradient beside its update, and each factor's eigenvalues beside its damping, as told last."""

import math
from typing import Any

from nicegui import ui

from ngd_service.client.units import counted, number
from ngd_service.dashboard.chart_panel import INK, LINE, MUTED, TOOLTIP, ChartPanel, axis
from ngd_service.dashboard.measures import PLAIN
from ngd_service.dashboard.theme import panel
from ngd_service.resources import Anatomy, FactorSpectrum, LayerAnatomy

__all__ = ["LayersPanel", "SpectraPanel"]

ROW_PX, FRAME_PX = 20, 84
FLOOR = 1e-12  # of the largest eigenvalue: rounding in float32 leaves no smaller one, and a logarithm has no 0
COLUMNS = (
    ("name", "layer"),
    ("gradient", "gradient norm"),
    ("update", "update norm"),
    ("ratio", "update / gradient"),
    ("cosine", "cosine"),
)
ROWS_OF_A_PAGE = 10
QUARTILES = ("least", "lower quartile", "median", "upper quartile", "largest")


class LayersPanel:
    """A row for each preconditioned layer, the one whose update departs most from its gradient first."""

    def __init__(self) -> None:
        with panel("Gradient and update of each layer", "wide"):
            self.whole = ui.context.slot.parent
            self.note = ui.label().classes("panel-note digits")
            columns = [
                {"name": key, "label": label, "field": key, "align": "left" if key == "name" else "right"}
                for key, label in COLUMNS
            ]
            with ui.element("div").classes("panel-body"):
                self.table = ui.table(rows=[], columns=columns, row_key="name", pagination=ROWS_OF_A_PAGE)
                self.table.classes("dense fill").props('flat dense aria-label="Gradient and update of each layer"')
        self.whole.set_visibility(False)

    def show(self, told: Anatomy) -> None:
        """Takes the newest that was told; nothing new leaves what is there."""
        if told.layers is not None:
            self.table.rows = layer_rows(told.layers)
            self.table.props["hide-pagination"] = len(self.table.rows) <= ROWS_OF_A_PAGE
            self.note.set_text(_said_of_layers(told.layers))
        self.whole.set_visibility(bool(self.table.rows))


class SpectraPanel(ChartPanel):
    """A box for each factor: its least and largest eigenvalue and the quartiles between, and a mark at the damping."""

    def __init__(self) -> None:
        self.spectra: dict[str, FactorSpectrum] = {}
        super().__init__("Spectra of the factors", _options(), classes="wide")
        self.show(is_needed=False)

    def add(self, told: Anatomy) -> None:
        """Takes the newest that was told; a factor that was not refreshed since stays as it is."""
        if not told.spectra:
            return
        self.spectra |= {spectrum.name: spectrum for spectrum in told.spectra}
        known = [*self.spectra.values()]
        options = self.chart.options
        options["yAxis"]["data"] = [spectrum.name for spectrum in known]
        options["grid"]["left"] = min(260, 24 + 7 * max(len(spectrum.name) for spectrum in known))
        options["series"][0]["data"] = [_box(spectrum) for spectrum in known]
        options["series"][1]["data"] = [
            [spectrum.damping, place] for place, spectrum in enumerate(known) if spectrum.damping
        ]
        self.chart.style(f"height: {FRAME_PX + ROW_PX * len(known)}px")
        self.chart.update()
        self.show(is_needed=True)
        self.describe(now=True)
        self.refill()

    def columns(self) -> list[tuple[str, str]]:
        names = [(f"q{place}", label) for place, label in enumerate(QUARTILES)]
        told = [("damping", "damping"), ("condition", "condition number"), ("from", "eigenvalues"), ("step", "step")]
        return [("key", "factor"), *names, *told]

    def rows(self) -> list[dict[str, Any]]:
        return [
            {key: number(value) if isinstance(value, float) else value for key, value in record.items()}
            for record in self.records()
        ]

    def records(self) -> list[dict[str, Any]]:
        return [
            {
                "key": spectrum.name,
                **{f"q{place}": value for place, value in enumerate(spectrum.quantiles)},
                "damping": spectrum.damping,
                "condition": math.inf if spectrum.condition is None else spectrum.condition,
                "from": "estimated" if spectrum.is_estimate else "exact",
                "step": spectrum.step,
            }
            for spectrum in self.spectra.values()
        ]

    def sentence(self) -> str:
        known = [*self.spectra.values()]
        if not known:
            return "No data yet"
        worst = max(known, key=lambda one: math.inf if one.condition is None else one.condition)
        held = sum(one.damping is not None and one.quantiles[3] < one.damping for one in known)
        condition = "infinite" if worst.condition is None else number(worst.condition)
        bound = "at least " if worst.is_estimate else ""
        guessed = sum(one.is_estimate for one in known)
        estimated = f"; {guessed:,} estimated, with dashed boxes" if guessed else ""
        return (
            f"highest condition number with damping {bound}{condition}, of {worst.name}; damping exceeds three "
            f"quarters of the eigenvalues of {held:,} of {counted(len(known), 'factor')}{estimated}"
        )


def layer_rows(layers: LayerAnatomy) -> list[dict[str, Any]]:
    """Returns the table's rows, the lowest cosine first."""
    told = zip(layers.names, layers.gradient_norms, layers.update_norms, layers.cosines, strict=False)
    in_order = sorted(told, key=lambda of: math.inf if of[3] is None else of[3])
    return [
        {
            "name": name,
            "gradient": number(gradient),
            "update": number(update),
            "ratio": number(update / gradient) if gradient else "—",
            "cosine": number(cosine),
        }
        for name, gradient, update, cosine in in_order
    ]


def _said_of_layers(layers: LayerAnatomy) -> str:
    known = [cosine for cosine in layers.cosines if cosine is not None]
    lowest = f", lowest cosine {number(min(known))}" if known else ""
    kl = f", KL of the step {number(layers.kl)}" if layers.kl is not None else ""
    clip = f", clip factor {number(layers.clip_factor)}" if layers.clip_factor is not None else ""
    return f"{counted(len(layers.names), 'layer')} at step {layers.step:,}{lowest}{kl}{clip}"


def _box(spectrum: FactorSpectrum) -> dict[str, Any]:
    floor = FLOOR * spectrum.quantiles[-1] or FLOOR
    line = {"borderType": "dashed"} if spectrum.is_estimate else {}
    return {"value": [max(value, floor) for value in spectrum.quantiles], "itemStyle": line}


def _options() -> dict[str, Any]:
    value = axis("eigenvalue", type="log", nameLocation="middle", nameGap=26)
    value["axisLabel"] |= {":formatter": PLAIN.browser}
    names = {"axisLine": {"lineStyle": {"color": LINE}}, "axisTick": {"show": False}, "axisLabel": {"color": INK}}
    style = {"color": "transparent", "borderColor": "var(--series-1)"}
    return {
        "animation": False,
        "grid": {"left": 120, "right": 18, "top": 30, "bottom": 46},
        "legend": {"top": 0, "left": 0, "textStyle": {"color": MUTED, "fontSize": 12}},
        "tooltip": TOOLTIP | {"trigger": "item"},
        "xAxis": value,
        "yAxis": {"type": "category", "inverse": True, **names},
        "series": [
            {"name": "eigenvalues", "type": "boxplot", "itemStyle": style, "boxWidth": [6, 12], "data": []},
            {
                "name": "damping",
                "type": "scatter",
                "symbol": "diamond",
                "symbolSize": 10,
                "itemStyle": {"color": "var(--series-2)"},
                "data": [],
            },
        ],
    }
