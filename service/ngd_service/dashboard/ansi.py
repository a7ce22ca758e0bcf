"""Pure: the colours that programs write for terminals, as HTML."""

import re

__all__ = ["as_html", "plain"]

# Select Graphic Rendition is drawn; all other control sequences (cursor moves, titles) have no meaning on a page.
SGR = re.compile(r"\x1b\[([\d;]*)m")
OTHER = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-_])|[\x00-\x08\x0b-\x1f]")
STYLES = {1: "bold", 2: "faint", 3: "italic", 4: "underline"} | {
    first + i: f"c{i}" for first in (30, 90) for i in range(8)
}


def as_html(line: str) -> str:
    """Returns a line, whose <, > and & are escaped already, with its colours as spans of theme-aware classes."""
    if "\x1b" not in line:
        return OTHER.sub("", line)
    styles: dict[str, None] = {}
    parts, end = [], 0
    for match in SGR.finditer(line):
        parts.append(_styled(line[end : match.start()], styles))
        for code in match[1].split(";"):
            _turn(styles, int(code or 0))
        end = match.end()
    return "".join([*parts, _styled(line[end:], styles)])


def plain(line: str) -> str:
    """Returns a line without its control sequences."""
    return OTHER.sub("", line)


def _turn(styles: dict[str, None], code: int) -> None:
    if code == 0:
        styles.clear()
    elif code == 39 or code in STYLES:
        colour = code == 39 or STYLES[code].startswith("c")
        for name in [name for name in styles if colour and name.startswith("c")]:
            del styles[name]
        if code in STYLES:
            styles[STYLES[code]] = None
    elif code == 22:
        styles.pop("bold", None)
        styles.pop("faint", None)


def _styled(text: str, styles: dict[str, None]) -> str:
    text = OTHER.sub("", text)
    names = " ".join(f"ansi-{name}" for name in styles)
    return f'<span class="{names}">{text}</span>' if names and text else text
