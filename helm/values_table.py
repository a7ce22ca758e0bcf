"""Writes the table of values into helm/ngd/README.md, from values.yaml and its `# --` comments.

python helm/values_table.py         # rewrites the README
python helm/values_table.py --check # exit code 1 if it is not current
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent / "ngd"
BEGIN, END = "<!-- values: made by helm/values_table.py -->", "<!-- end of values -->"
KEY = re.compile(r"^( *)([A-Za-z][\w.]*):(?: |$)")
LONGEST_DEFAULT = 120
COMMENT = re.compile(r"^ *# ?(.*)$")


def main(arguments: list[str]) -> int:
    readme = CHART / "README.md"
    written = readme.read_text()
    current = with_table(written, table((CHART / "values.yaml").read_text()))
    if "--check" in arguments:
        return int(written != current)
    readme.write_text(current)
    return 0


def with_table(readme: str, rows: str) -> str:
    before, _, rest = readme.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n{rows}\n{END}{after}"


def table(text: str) -> str:
    values = yaml.safe_load(text)
    rows = ["| value | default | what it is |", "|---|---|---|"]
    for path, description in described(text):
        default: Any = values
        for key in path:
            default = default[key]
        shown = f"`{json.dumps(default)}`" if len(json.dumps(default)) <= LONGEST_DEFAULT else "in values.yaml"
        rows.append(f"| `{'.'.join(path)}` | {shown} | {description.replace('|', '&#124;')} |")
    return "\n".join(rows)


def described(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields each path that has a `# --` comment above it, and that comment."""
    path: list[str] = []
    comment: list[str] = []
    for line in text.splitlines():
        key, note = KEY.match(line), COMMENT.match(line)
        if note:
            words = note[1].strip()
            comment = [words.removeprefix("-- ")] if words.startswith("-- ") else [*comment, words] if comment else []
        elif key:
            depth = len(key[1]) // 2
            path = [*path[:depth], key[2]]
            if comment:
                yield tuple(path), " ".join(comment)
            comment = []
        else:
            comment = []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
