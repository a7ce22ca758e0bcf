"""The pictures of the documentation are readable on light and on dark pages."""

import re

import pytest

from benchmarks.themes import DARK_PAPER, LEAST_CONTRAST, on_dark, themed
from tests.support import ROOT

PICTURES = sorted((ROOT / "docs").rglob("*.svg"))


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return sum(
        weight * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
        for weight, c in zip((0.2126, 0.7152, 0.0722), channels, strict=True)
    )


@pytest.mark.parametrize("colour", ["#000000", "#3949ab", "#1f77b4", "#d62728", "#8d6e63"])
def test_ink_and_colours_stand_out_on_dark_paper(colour: str) -> None:
    ratio = (luminance(on_dark(colour)) + 0.05) / (luminance(DARK_PAPER) + 0.05)

    assert ratio >= LEAST_CONTRAST


def test_a_picture_names_its_colours_once_for_each_theme() -> None:
    svg = '<svg width="1"><rect fill="white"/><path style="stroke: #3949ab" href="#m3949ab"/><text>a</text></svg>'

    told = themed(svg)

    assert 'fill="var(--cffffff)"' in told
    assert 'style="stroke: var(--c3949ab)" href="#m3949ab"' in told
    assert themed(told) == told


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_every_picture_of_the_documentation_has_both_themes(path) -> None:
    text = path.read_text()

    assert "prefers-color-scheme:dark" in text, "run: make pictures, or python -m benchmarks.report"
    assert set(re.findall(r"var\((--c\w+)\)", text)) <= set(re.findall(r"(--c\w+):#", text))
