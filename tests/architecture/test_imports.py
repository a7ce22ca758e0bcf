"""The picture of imports in docs/architecture.md is of today, and nothing in it leads up or in a circle."""

import importlib.util
from types import ModuleType

import pytest

from tests.support import ROOT

WRITER = ROOT / "docs" / "reference" / "import_picture.py"


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("import_picture", WRITER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_picture_is_current(writer: ModuleType) -> None:
    assert writer.PAGE.read_text() == writer.page(), "run: make docs"


@pytest.mark.parametrize("package", ["ngd_dist", "ngd_workers", "ngd_service"])
def test_no_import_leads_up_or_in_a_circle(writer: ModuleType, package: str) -> None:
    picture = next(picture for picture in writer.pictures() if picture.package == package)

    assert picture.up() == set()
    assert picture.circles() == set()
    assert picture.rooms == set().union(*picture.floors)


def test_circle_and_arrow_up_are_seen(writer: ModuleType) -> None:
    arrows = frozenset({("top", "low"), ("low", "lowest"), ("lowest", "low"), ("low", "beside")})
    floors = (frozenset({"top"}), frozenset({"low", "beside"}), frozenset({"lowest"}))

    picture = writer.Picture("package", frozenset().union(*floors), arrows, floors)

    assert picture.circles() == {frozenset({"low", "lowest"})}
    assert picture.up() == {("lowest", "low"), ("low", "beside")}
    assert picture.drawn() == sorted(arrows)


def test_arrow_that_others_imply_is_not_drawn(writer: ModuleType) -> None:
    arrows = frozenset({("a", "b"), ("b", "c"), ("a", "c")})

    picture = writer.Picture("package", frozenset("abc"), arrows, tuple(frozenset(room) for room in "abc"))

    assert picture.drawn() == [("a", "b"), ("b", "c")]
