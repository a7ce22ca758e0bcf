"""What is wrong with a job: each problem with its place, what was wanted, what was given, and the advice."""

from collections.abc import Mapping, Sequence

from nicegui import ui

from ngd_service.client.units import counted
from ngd_service.resources import ProblemItem

__all__ = ["ProblemList"]


class ProblemList:
    """A notice that is there as long as there are problems."""

    def __init__(self) -> None:
        with ui.element("div").classes("panel notice").props('role=alert aria-label="Problems"') as self.whole:
            ui.icon("error").props("aria-hidden=true")
            with ui.element("div").classes("notice-text"):
                self.title = ui.label().style("font-weight: 600")
                self.list = ui.element("ul").classes("problems")
        self.whole.set_visibility(False)

    def show(self, problems: Sequence[ProblemItem], lines: Mapping[str, int]) -> None:
        """Shows the problems; none: takes the notice away. lines: of each value of the text, by its pointer."""
        self.whole.set_visibility(bool(problems))
        self.title.set_text(f"{counted(len(problems), 'problem')}: the job can't be submitted as it is")
        self.list.clear()
        with self.list:
            for problem in problems:
                with ui.element("li"):
                    if problem.pointer:
                        line = lines.get(problem.pointer)
                        where = problem.pointer.strip("/").replace("/", ".")
                        ui.label(where + (f" (line {line})" if line else "")).classes("mono where")
                    ui.label(problem.detail)
                    if problem.hint:
                        ui.label(problem.hint).classes("muted")
