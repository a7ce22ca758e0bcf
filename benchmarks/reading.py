"""What lies in benchmarks/results, for the page and for its plots."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.methods.catalogue import METHODS
from benchmarks.methods.protocol import median_of

__all__ = ["Result", "compared_in", "groups", "is_ours", "medians"]


@dataclass(frozen=True)
class Result:
    """One folder of benchmarks/results: <date>_<question>_<hardware>."""

    folder: Path

    @property
    def question(self) -> str:
        return self.folder.name.split("_")[1]

    @property
    def document(self) -> dict[str, Any]:
        path = self.folder / "result.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    @property
    def hardware(self) -> str:
        return self.folder.name.split("_", 2)[2]

    @property
    def plot(self) -> str:
        return f"performance/{self.question}_{self.hardware}.svg"

    def plot_of(self, part: str) -> str:
        return f"performance/{self.question}-{part}_{self.hardware}.svg"


def compared_in(results: list[Result]) -> Result | None:
    """Returns the newest comparison of methods by seconds and steps to their targets."""
    return next((result for result in results if result.question in ("methods", "steps-to-target")), None)


def is_ours(method: str) -> bool:
    """Returns whether the method is this package's; in the earlier search K-FAC's rows were called ngd."""
    return method.startswith("ngd") or METHODS[method].is_ours


def medians(rows: list[dict[str, Any]], what: str) -> dict[str, float]:
    return {method: median_of(of_method, what) for (method,), of_method in groups(rows, "method")}


def groups(rows: list[dict[str, Any]], *keys: str) -> Iterator[tuple[tuple[Any, ...], list[dict[str, Any]]]]:
    for values in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        yield values, [row for row in rows if tuple(row[key] for key in keys) == values]
