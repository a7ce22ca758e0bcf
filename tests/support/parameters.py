"""Parameters of tests that take seconds each."""

from collections.abc import Iterable

import pytest

__all__ = ["rest_is_slow"]


def rest_is_slow(names: Iterable[str], *first: str) -> list[object]:
    """Returns all names as parameters; those that are not among the first run with `make test-slow` alone."""
    every = list(names)
    assert set(first) <= set(every), f"{set(first) - set(every)} are none of {every}"
    return [name if name in first else pytest.param(name, marks=pytest.mark.slow) for name in every]
