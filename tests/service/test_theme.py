"""The dashboard's colours: text has a contrast of 4.5 to 1 on what it stands on, in light and in dark."""

import re

import pytest

from ngd_service.dashboard.theme import CSS

LEAST = 4.5  # WCAG 2.2, 1.4.3
TEXTS = ("ink", "muted", "accent", "good", "bad", "busy", "warn")
GROUNDS = ("page", "surface", "sunken")


def colours(scheme: str) -> dict[str, str]:
    light, dark = (dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", part.partition("}")[0]))
                   for part in CSS.read_text().split("{")[1:3])  # fmt: skip
    return light if scheme == "light" else light | dark


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted(map(luminance, (one, other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(scheme: str) -> None:
    of = colours(scheme)
    pairs = [(text, ground) for text in TEXTS for ground in GROUNDS] + [("surface", "accent"), ("surface", "bad")]

    assert {
        pair: round(contrast(*map(of.__getitem__, pair)), 2)
        for pair in pairs
        if contrast(*map(of.__getitem__, pair)) < LEAST
    } == {}
