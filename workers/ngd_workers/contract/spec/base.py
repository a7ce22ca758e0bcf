"""The base of every part of a spec, and the types that several parts use."""

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

__all__ = [
    "MAX_SAMPLES",
    "MAX_STEPS",
    "NAME_PATTERN",
    "Function",
    "Options",
    "SpecModel",
    "list_to_tuple",
]

NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"  # RFC 1035 label
FUNCTION_PATTERN = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
MAX_DEPTH = 16
MAX_INT = 2**63 - 1
MAX_STEPS = 1_000_000_000  # eleven days at a step per millisecond
MAX_SAMPLES = 1_000_000_000  # in a batch


def _json_value(value: object, where: str = "options", depth: int = 0) -> object:
    """Returns the value if JSON and a database can hold it as it is. Raises: ValueError."""
    if depth > MAX_DEPTH:
        raise ValueError(f"values may lie {MAX_DEPTH} levels deep, and one lies deeper; flatten them")
    match value:
        case None | bool():
            pass
        case int() if abs(value) > MAX_INT:
            raise ValueError(f"{where} must fit in 64 bits; give it as a text")
        case float() if not math.isfinite(value):
            raise ValueError(f"{where} must be a finite number, got {value}")
        case int() | float():
            pass
        case str():
            if any("\ud800" <= character <= "\udfff" for character in value):
                raise ValueError(f"{where} must be valid Unicode, got {value!a}")
        case list():
            for index, item in enumerate(value):
                _json_value(item, f"{where}[{index}]", depth + 1)
        case dict():
            for key, item in value.items():
                if not isinstance(key, str):
                    raise ValueError(f"{where} must have texts as names, got {key!r}; quote it")
                _json_value(key, f"a name in {where}", depth + 1)
                _json_value(item, f"{where}.{key}", depth + 1)
        case _:
            kinds = "a text, a finite number, true, false, null, a list or an object"
            raise ValueError(f"{where} must be {kinds}, got a {type(value).__name__}")
    return value


Options = Annotated[
    dict[str, Any], BeforeValidator(_json_value), Field(description="Keyword arguments passed to the function.")
]
Function = Annotated[
    str,
    Field(
        pattern=FUNCTION_PATTERN,
        description="package.module:function, of the job's own code or of a package that the workers have.",
    ),
]


def list_to_tuple(given: object) -> object:
    """Returns a list as a tuple, which neither YAML nor JSON has and strict types ask for; else the value itself."""
    return tuple(given) if isinstance(given, list) else given


class SpecModel(BaseModel):
    """Base of every part of a spec: frozen, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
