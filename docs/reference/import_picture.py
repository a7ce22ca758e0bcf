"""Writes the picture of imports in docs/architecture.md, from the code and from the layers of pyproject.toml.

Run: python docs/reference/import_picture.py
"""

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- imports: written by docs/reference/import_picture.py -->\n", "<!-- imports: end -->\n"
PACKAGES = ("ngd_dist", "ngd_workers", "ngd_service")

Arrow = tuple[str, str]  # a room, and another one that it imports


@dataclass(frozen=True, slots=True)
class Picture:
    """The rooms of a package, which are the modules and folders of its root, and the imports between them."""

    package: str
    rooms: frozenset[str]
    arrows: frozenset[Arrow]
    floors: tuple[frozenset[str], ...]  # from the top, as pyproject.toml has them

    def circles(self) -> set[frozenset[str]]:
        """Returns the sets of rooms in which each room reaches each other one."""
        reached = {room: self._reached(room) for room in self.rooms}
        circles = {frozenset(b for b in reached[a] if a in reached[b]) for a in self.rooms if a in reached[a]}
        return {circle for circle in circles if len(circle) > 1}

    def up(self) -> set[Arrow]:
        """Returns the arrows to a room of a floor above, or to another room of the same floor."""
        floor = {room: number for number, rooms in enumerate(self.floors) for room in rooms}
        return {(importer, imported) for importer, imported in self.arrows if floor[importer] >= floor[imported]}

    def drawn(self) -> list[Arrow]:
        """Returns the arrows without those that a longer way through other arrows implies."""
        if self.circles():
            return sorted(self.arrows)
        return sorted(
            (a, b) for a, b in self.arrows if not any(b in self._reached(c) for c in self._imported(a) if c != b)
        )

    def _imported(self, room: str) -> set[str]:
        return {b for a, b in self.arrows if a == room}

    def _reached(self, room: str) -> set[str]:
        reached, waiting = set[str](), self._imported(room)
        while waiting:
            reached |= waiting
            waiting = {b for a, b in self.arrows if a in waiting} - reached
        return reached


def pictures() -> list[Picture]:
    """Returns one picture per package, from the library up."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    floors = {
        contract["containers"][0]: tuple(frozenset(layer.split(" | ")) for layer in contract["layers"])
        for contract in contracts
        if "containers" in contract
    }
    return [_picture(graph, package, floors[package]) for package in PACKAGES]


def _picture(graph: grimp.ImportGraph, package: str, floors: tuple[frozenset[str], ...]) -> Picture:
    room_of = {module: module.split(".")[1] for module in graph.find_descendants(package)}
    arrows = {
        (room_of[importer], room_of[imported])
        for importer in room_of
        for imported in graph.find_modules_directly_imported_by(importer)
        if imported in room_of and room_of[imported] != room_of[importer]
    }
    return Picture(package, frozenset(room_of.values()), frozenset(arrows), floors)


def section() -> str:
    """Returns the text between the two markers of the page."""
    return "\n".join(line for picture in pictures() for line in _lines(picture))


def _lines(picture: Picture) -> Iterator[str]:
    yield f"### Imports inside {picture.package}\n"
    yield "```mermaid\nflowchart TD"
    yield from (f"  {a} --> {b}" for a, b in picture.drawn())
    yield from (f"  {room}" for room in sorted(picture.rooms - {room for arrow in picture.arrows for room in arrow}))
    yield "```\n"
    counts = f"{len(picture.rooms)} rooms, {len(picture.arrows)} arrows, {len(picture.circles())} circles"
    yield f"{counts}, {len(picture.up())} arrows up.\n"


def page() -> str:
    """Returns docs/architecture.md with the section of today."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return f"{before}{BEGIN}\n{section()}\n{END}{rest.partition(END)[2]}"


def main() -> None:
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
