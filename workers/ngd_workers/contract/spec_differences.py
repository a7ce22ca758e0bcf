"""The settings in which specs differ, by dotted path. Imports without torch."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["differences"]


def differences(specs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Returns the values of each setting that differs, by its dotted path; None where a spec has no such setting.

    >>> differences([{"optimizer": {"kind": "sgd", "lr": 1}}, {"optimizer": {"kind": "sgd", "lr": 2}}])
    {'optimizer.lr': [1, 2]}
    """
    leaves = [dict(_leaves(spec)) for spec in specs]
    paths = dict.fromkeys(path for each in leaves for path in each)
    rows = {path: [each.get(path) for each in leaves] for path in paths}
    return {path: row for path, row in rows.items() if any(value != row[0] for value in row)}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, part in value.items():
            yield from _leaves(part, f"{path}.{name}" if path else name)
    else:
        yield path, value
