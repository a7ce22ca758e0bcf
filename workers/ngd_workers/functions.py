"""Finds functions by their addresses, `package.module:function`, in the registries and in users' specs."""

import importlib
from collections.abc import Callable
from typing import Any

from ngd_workers.contract.errors import UserCodeError

__all__ = ["call_user", "load_function"]


def load_function(address: str) -> Callable[..., Any]:
    """Returns the function at `package.module:function`. Raises: UserCodeError that says which part is missing."""
    module_name, _, name = address.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # an import runs the user's code, which may raise anything
        raise UserCodeError(
            f"can't import {module_name!r} of {address!r}: {_brief(error)}; install the package where the workers run, "
            "or start the service from the folder that holds it"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserCodeError(f"{module_name!r} has no function {name!r}, wanted by {address!r}; check the spelling")
    return function  # type: ignore[no-any-return]


def call_user(address: str, *args: Any, **options: Any) -> Any:
    """Returns the result of the user's function. Raises: UserCodeError in place of any error of the function."""
    function = load_function(address)
    try:
        return function(*args, **options)
    except Exception as error:  # user code may raise anything
        raise UserCodeError(f"{address!r} failed with {_brief(error)}; called with options {options}") from error


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
