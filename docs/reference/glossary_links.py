"""A hook of MkDocs: the first use of each word of the glossary on a page of prose links to it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.pages import Page

GLOSSARY = "glossary.md"
PROSE = (
    "index.md",
    "start/",
    "guides/",
    "examples.md",
    "extending.md",
    "architecture.md",
    "methods.md",
    "operations.md",
)
ROW = re.compile(r"^\| ([^|]+) \| (.+) \|$", re.MULTILINE)
# Words of the glossary that prose uses in their everyday sense as well.
EVERYDAY = {
    "age", "apply", "attempt", "block", "card", "direction", "driver", "due", "ending", "engine", "estimate",
    "event", "form", "group", "home", "interval", "job", "layer", "lease", "metric", "owner", "part", "phase", "pi",
    "piece", "place", "position", "rank", "report", "row", "run", "size", "sketch", "source", "spec", "stack",
    "statistic", "step", "strategy", "task", "threshold", "transform", "verdict", "word",
}  # fmt: skip
LEFT_ALONE = re.compile(
    r"```.*?^ *```|`[^`]*`|!?\[[^\]]*\]\([^)]*\)|^#.*?$|<[^>]+>|^--8<--.*?$", re.MULTILINE | re.DOTALL
)


def on_page_markdown(markdown: str, page: Page, config: dict[str, Any], **_: Any) -> str:
    """Returns the page with its links; the glossary itself with the places that they lead to."""
    source = page.file.src_uri
    if source == GLOSSARY:
        return ROW.sub(lambda row: f'| <a id="{_id(row[1])}"></a>{row[1]} | {row[2]} |', markdown)
    if not source.startswith(PROSE):
        return markdown
    path = "../" * source.count("/") + GLOSSARY
    for word, place in _words(Path(config["docs_dir"])):
        markdown = _linked(markdown, word, f"{path}#{place}")
    return markdown


def _words(docs: Path) -> Iterator[tuple[str, str]]:
    for cell, _ in ROW.findall((docs / GLOSSARY).read_text()):
        for word in cell.split(", "):
            name = re.sub(r" \(.*\)", "", word)
            if name not in EVERYDAY and "`" not in name and not set(name) <= {"-"}:
                yield name, _id(cell)


def _id(cell: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", cell.split(", ")[0].lower()).strip("-")


def _linked(markdown: str, word: str, link: str) -> str:
    """Returns the text with a link at the first use of the word in prose: no code, link, heading or table."""
    used = re.compile(rf"(?<![\w/-]){re.escape(word)}(?:s|es)?(?![\w/-])")
    start = 0
    for left_alone in [*LEFT_ALONE.finditer(markdown), None]:
        end = left_alone.start() if left_alone else len(markdown)
        if end >= start and (found := used.search(markdown, start, end)) and not _in_table(markdown, found.start()):
            return f"{markdown[: found.start()]}[{found[0]}]({link}){markdown[found.end() :]}"
        start = left_alone.end() if left_alone else end
    return markdown


def _in_table(markdown: str, at: int) -> bool:
    return markdown[markdown.rfind("\n", 0, at) + 1 :].startswith("|")
