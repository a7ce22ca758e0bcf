"""Each message that docs/guides/when-it-fails.md quotes is one that the code can say."""

import re

from tests.support import ROOT

PAGE = ROOT / "docs" / "guides" / "when-it-fails.md"
SOURCES = [path for folder in ("ngd_dist", "workers", "service") for path in (ROOT / folder).rglob("*.py")]
HAS_WORDS = re.compile(r"\w+ \w+ \w+")


def plain(source: str) -> str:
    """Returns the text with the ends of neighbouring literals taken out, so that a message is in one piece."""
    return re.sub(r'"\s*\n\s*f?"', "", source)


def test_every_quoted_message_is_in_the_code() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    messages = [row.split("`")[1] for row in rows]
    code = "\n".join(plain(path.read_text()) for path in SOURCES)

    parts = {part.strip() for message in messages for part in message.split("...") if HAS_WORDS.search(part)}

    assert len(parts) > 15
    assert sorted(part for part in parts if part not in code) == []
