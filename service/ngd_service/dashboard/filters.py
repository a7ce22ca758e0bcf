"""Which jobs the list shows, in which order: kept in the address of the page, and chosen in a row of fields."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, replace
from urllib.parse import urlencode

from nicegui import ui

from ngd_service.dashboard.theme import PHASE_ICONS

__all__ = ["FilterRow", "Filters"]

ORDERS = {
    "state": "Running first",
    "-created": "Newest first",
    "created": "Oldest first",
    "name": "Name",
    "owner": "Owner",
    "optimizer": "Optimizer",
    "-lr": "Learning rate, highest first",
    "lr": "Learning rate, lowest first",
    "target_step": "Fewest steps to target",
    "target_s": "Fewest seconds to target",
}
OPTIMIZERS = ("ngd", "sgd", "adamw", "lars", "lamb", "muon", "soap", "shampoo")
TYPING = "debounce=300 dense outlined clearable"


@dataclass(frozen=True, slots=True)
class Filters:
    """The choices of a reader, by the names that GET /jobs has for them; page: the token of the page that is shown."""

    q: str = ""
    phase: str = ""
    optimizer: str = ""
    owner: str = ""
    label: str = ""
    order_by: str = "state"
    page: str = ""

    @classmethod
    def of(cls, query: Mapping[str, str]) -> "Filters":
        """Returns the choices of an address."""
        return cls(**{name: query[name] for name in cls.__slots__ if name in query})

    @property
    def are_any(self) -> bool:
        """Whether jobs may be left out."""
        return replace(self, order_by="state", page="") != Filters()

    def given(self) -> dict[str, str]:
        """Returns the choices that are not the default."""
        default = asdict(Filters())
        return {name: value for name, value in asdict(self).items() if value != default[name]}

    def address(self, selected: tuple[str, ...] = ()) -> str:
        """Returns the address of the page with these choices, and with these jobs marked."""
        query = self.given() | ({"selected": ",".join(selected)} if selected else {})
        return f"/?{urlencode(query, safe=',')}" if query else "/"


class FilterRow:
    """The fields; `choose` is called with the filters that the reader has made of them."""

    def __init__(self, filters: Filters, choose: Callable[[Filters], Awaitable[None]]) -> None:
        self.filters = filters
        self._tell = choose
        with ui.element("div").classes("controls filters").props('role=search aria-label="Jobs"'):
            self._input("q", "Search names and ids", "wide").props('type=search data-key="/"')
            self._select("phase", "Phase", {"": "Any phase"} | {phase: phase.capitalize() for phase in PHASE_ICONS})
            kinds = dict.fromkeys((*OPTIMIZERS, *filter(None, [filters.optimizer])))
            self._select("optimizer", "Optimizer", {"": "Any optimizer"} | {kind: kind for kind in kinds})
            self._input("owner", "Owner")
            self._input("label", "Label (a=b)")
            self._select(
                "order_by", "Order", ORDERS if filters.order_by in ORDERS else ORDERS | {filters.order_by: "Other"}
            )

    def _input(self, name: str, label: str, classes: str = "") -> ui.input:
        field = ui.input(placeholder=label, value=getattr(self.filters, name)).props(TYPING).classes(classes)
        field.props["aria-label"] = label
        field.on_value_change(lambda event: self._choose(name, event.value))
        return field

    def _select(self, name: str, label: str, options: dict[str, str]) -> None:
        value = getattr(self.filters, name)
        field = ui.select(options, value=value if value in options else next(iter(options)))
        field.props("dense outlined options-dense").props["aria-label"] = label
        field.on_value_change(lambda event: self._choose(name, event.value))

    def _choose(self, name: str, value: str | None) -> Awaitable[None]:
        self.filters = replace(self.filters, page="", **{name: value or ""})
        return self._tell(self.filters)  # NiceGUI awaits what a handler returns
