"""The parts of a job's page, each with an anchor, and the row of links to them."""

from collections.abc import Iterator
from contextlib import contextmanager

from nicegui import ui

__all__ = ["Sections"]


class Sections:
    """Sections may be hidden, as those without data are; the links to them go with them."""

    def __init__(self) -> None:
        self.links = ui.element("nav").classes("anchors").props('aria-label="Parts of the page"')
        self.parts: dict[str, tuple[ui.element, ui.element]] = {}

    @contextmanager
    def section(self, name: str, *, is_titled: bool = True) -> Iterator[None]:
        """Lays out a section; its title is left out where its only panel says the same."""
        anchor = name.lower()
        with self.links:
            link = ui.link(name, f"#{anchor}")
        with ui.element("section").classes("part").props(f'id={anchor} aria-label="{name}"') as whole:
            if is_titled:
                with ui.element("div").classes("part-title").props("role=heading aria-level=2"):
                    ui.label(name)
            yield
        self.parts[name] = (whole, link)

    def show(self, name: str, *, is_needed: bool) -> None:
        """Shows a section and its link, or takes both from the page."""
        for element in self.parts[name]:
            element.set_visibility(is_needed)
