"""How a reader looks at a job's charts: kept in the page's address, so that a link shows another reader the same."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nicegui import ui
from nicegui.events import ValueChangeEventArguments
from starlette.datastructures import QueryParams

__all__ = ["MOST_SMOOTHING", "View", "ViewBar"]

MOST_SMOOTHING = 0.95


@dataclass
class View:
    """What the reader has chosen. smoothing: weight of the past in the curves' moving average, 0 for none.

    window: the first and the last step in view; None: all. axes: by a chart's title whether the reader made it
    logarithmic. colour: the number that colours the heat map.
    """

    smoothing: float = 0.0
    ignores_outliers: bool = True
    follows: bool = False
    window: tuple[int, int] | None = None
    axes: dict[str, bool] = field(default_factory=dict)
    colour: str = "age"

    @classmethod
    def of(cls, query: QueryParams) -> "View":
        """Returns the view of an address; a part of it that makes no sense is passed over."""
        first, last = _number(query.get("from")), _number(query.get("to"))
        smoothing = _number(query.get("smooth"))
        return cls(
            smoothing=min(MOST_SMOOTHING, max(0.0, smoothing or 0.0)),
            ignores_outliers=query.get("outliers") != "shown",
            follows=query.get("follow") == "on",
            window=(int(first), int(last)) if first is not None and last is not None and first < last else None,
            axes=dict.fromkeys(query.getlist("log"), True) | dict.fromkeys(query.getlist("linear"), False),
            colour=query.get("colour", "age"),
        )

    @property
    def script(self) -> str:
        """The script that keeps the view in the page's address; the zoom is kept by the browser itself."""
        chosen = {
            "smooth": f"{self.smoothing:g}" if self.smoothing else None,
            "outliers": None if self.ignores_outliers else "shown",
            "follow": "on" if self.follows else None,
            "log": [title for title, is_log in self.axes.items() if is_log],
            "linear": [title for title, is_log in self.axes.items() if not is_log],
            "colour": None if self.colour == "age" else self.colour,
        }
        return f"ngd.keep({json.dumps(chosen)});ngd.follows={json.dumps(self.follows)};"


class ViewBar:
    """The row above the charts: smoothing, outliers, whether a zoomed view follows, and the way back to all steps."""

    def __init__(self, view: View, redraw: Callable[[], None]) -> None:
        self.view = view
        self.redraw = redraw
        with ui.element("div").classes("view-bar"):
            with ui.element("label").classes("smoothing"):
                ui.label("Smoothing")
                slider = ui.slider(min=0, max=MOST_SMOOTHING, step=0.05, value=view.smoothing, on_change=self._smooth)
                slider.props('dense aria-label="Smoothing" label').props("throttle=200")
                self.weight = ui.label().classes("digits muted")
            outliers = ui.switch("Ignore outliers", value=view.ignores_outliers, on_change=self._ignore)
            follows = ui.switch("Follow the latest", value=view.follows, on_change=self._follow)
            for switch in (outliers, follows):
                switch.props("dense")
            all_steps = ui.button("All steps", icon="zoom_out_map", color=None).props("flat dense no-caps")
            all_steps.classes("plain").on("click", js_handler="() => ngd.zoom(null)")
            ui.label("Drag in a chart to zoom; double-click to see all").classes("muted hint")
        self._say_weight()

    def _smooth(self, event: ValueChangeEventArguments[Any]) -> None:
        self.view.smoothing = round(float(event.value), 2)
        self._say_weight()
        self._changed()

    def _ignore(self, event: ValueChangeEventArguments[Any]) -> None:
        self.view.ignores_outliers = bool(event.value)
        self._changed()

    def _follow(self, event: ValueChangeEventArguments[Any]) -> None:
        self.view.follows = bool(event.value)
        ui.run_javascript(self.view.script)

    def _say_weight(self) -> None:
        self.weight.set_text(f"{self.view.smoothing:g}" if self.view.smoothing else "off")

    def _changed(self) -> None:
        ui.run_javascript(self.view.script)
        self.redraw()


def _number(text: str | None) -> float | None:
    try:
        number = math.nan if text is None else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
