"""Finds functions by their addresses, `package.module:function`, in the registries and in users' specs."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
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
            f"can't import {module_name!r} of {address!r}: {_brief(error)}{_way_out(error, module_name)}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        advice = _hidden(module) or "check the spelling"
        raise UserCodeError(f"{module_name!r} has no function {name!r}, wanted by {address!r}; {advice}")
    return function  # type: ignore[no-any-return]


def call_user(address: str, *args: Any, **options: Any) -> Any:
    """Returns the result of the user's function. Raises: UserCodeError in place of any error of the function."""
    function = load_function(address)
    try:
        return function(*args, **options)
    except Exception as error:  # user code may raise anything
        raise UserCodeError(f"{address!r} failed with {_brief(error)}; called with options {options}") from error


def _way_out(error: Exception, module_name: str) -> str:
    """Returns advice for a module that is missing; one that fails by itself says enough."""
    if not isinstance(error, ModuleNotFoundError):
        return ""
    if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
        return (
            "; ship the folder that holds it by `code: {directory: .}` in the job, or install the package where the "
            "workers run"
        )
    return "; name its package in code.requirements, or install it where the workers run"


def _hidden(module: ModuleType) -> str | None:
    """Returns advice if the present folder, the last on the path, has a module of this name that another one hides."""
    name, folder = module.__name__.partition(".")[0], Path.cwd()
    own = next((path for path in (folder / f"{name}.py", folder / name) if path.exists()), None)
    file = getattr(module, "__file__", None)
    if own is None or file is None or Path(file).is_relative_to(folder):
        return None
    return f"{file} comes before your {own.name}: give yours a name that no installed package has"


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
