"""One SVG for light and dark pages: its colours are variables, and a media query sets them.

A browser gives an SVG inside <img> the colour scheme of the element around it, so that a picture follows the switch of
a page as well as the system. The paper is part of the picture: where a browser does not follow, it is still readable.
"""

import colorsys
import re
from collections.abc import Sequence

__all__ = ["themed"]

COLOUR = re.compile(r"(?<![\w&])#[0-9a-f]{6}\b")
PAPER, DARK_PAPER, DARK_INK = "#ffffff", "#1e2029", "#e2e4e9"
LEAST_CONTRAST = 4.5  # of WCAG 2.1, between a colour and the paper
GREY = 0.15  # of saturation: below it a colour is ink, a grid or paper


def themed(svg: str) -> str:
    """Returns the SVG with its colours as variables of two themes; one that has them already stays as it is."""
    if "prefers-color-scheme" in svg:
        return svg
    ends = svg.index(">", svg.index("<svg")) + 1
    head, body = svg[:ends], svg[ends:].replace('"white"', f'"{PAPER}"').replace('"black"', '"#000000"')
    colours = sorted(set(COLOUR.findall(body)) | {"#000000", PAPER})
    light = "".join(f"--c{colour[1:]}:{colour};" for colour in colours)
    dark = "".join(f"--c{colour[1:]}:{on_dark(colour)};" for colour in colours)
    style = (
        f"\n<style>:root{{{light}}}svg{{background:var(--cffffff)}}text{{fill:var(--c000000)}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    )
    return head + style + COLOUR.sub(lambda colour: f"var(--c{colour[0][1:]})", body)


def on_dark(colour: str) -> str:
    """Returns the colour for a dark page: greys turn round, and others are lightened until they stand out.

    >>> on_dark("#ffffff"), on_dark("#000000")
    ('#1e2029', '#e2e4e9')
    """
    hue, lightness, saturation = colorsys.rgb_to_hls(*_rgb(colour))
    if saturation < GREY:
        paper, ink = _rgb(DARK_PAPER), _rgb(DARK_INK)
        return _hex([i + lightness * (p - i) for p, i in zip(paper, ink, strict=True)])
    while _contrast(colour) < LEAST_CONTRAST and lightness < 1:
        lightness = min(1.0, lightness + 0.02)
        colour = _hex(colorsys.hls_to_rgb(hue, lightness, saturation))
    return colour


def _contrast(colour: str) -> float:
    return (_luminance(colour) + 0.05) / (_luminance(DARK_PAPER) + 0.05)


def _luminance(colour: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in _rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _rgb(colour: str) -> list[float]:
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def _hex(rgb: Sequence[float]) -> str:
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in rgb)
