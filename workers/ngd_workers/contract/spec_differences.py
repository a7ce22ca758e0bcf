"""The settings in which specs differ, by dotted path. Imports without torch."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from ngd_workers.contract.spec import spec_class

__all__ = ["differences"]


def differences(specs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Returns the values of each setting that differs, by its dotted path; None where a spec has no such setting.

    A setting that some spec does not have, since it chose another `kind`, is left out where it has its default: a job
    with another optimizer differs in that, and not in fifty defaults.

    >>> differences([{"optimizer": {"kind": "sgd", "lr": 1}}, {"optimizer": {"kind": "sgd", "lr": 2}}])
    {'optimizer.lr': [1, 2]}
    """
    leaves = [dict(_leaves(spec)) for spec in specs]
    given = {path for spec in specs for path in _given(spec)}
    paths = dict.fromkeys(path for each in leaves for path in each)
    rows = {path: [each.get(path) for each in leaves] for path in paths if path in given or _all_have(path, leaves)}
    return {path: row for path, row in rows.items() if any(value != row[0] for value in row)}


def _all_have(path: str, leaves: Sequence[Mapping[str, Any]]) -> bool:
    return all(path in each for each in leaves)


def _given(spec: Mapping[str, Any]) -> Iterator[str]:
    """Yields the paths of what is not a default, and of the kinds above; all paths if this version can't read it."""
    try:
        read = spec_class(spec).model_validate(spec)
        plain: Mapping[str, Any] = read.model_dump(mode="json", exclude_defaults=True)
    except ValidationError:
        plain = spec
    for path, _ in _leaves(plain):
        yield path
        names = path.split(".")
        yield from (".".join([*names[:end], "kind"]) for end in range(1, len(names) + 1))


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, part in value.items():
            yield from _leaves(part, f"{path}.{name}" if path else name)
    else:
        yield path, value
