"""Reads a JobSpec from a YAML or JSON file, and words what is wrong with it. Imports without torch."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from workers.errors import SpecError
from workers.spec import JobSpec

__all__ = ["explain", "load_spec"]


def load_spec(path: Path) -> JobSpec:
    """Returns the spec in the file; JSON is YAML. Raises: SpecError with one line per problem."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"can't read the spec {path}: {error.strerror}; give a YAML or JSON file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"the spec {path} is neither YAML nor JSON: {error}") from error
    if not isinstance(content, dict):
        raise SpecError(f"the spec {path} must be a mapping with name, model, data ..., got {type(content).__name__}")
    try:
        return JobSpec.model_validate(content)
    except ValidationError as error:
        raise SpecError(f"the spec {path} is invalid:\n  " + "\n  ".join(explain(error, content))) from error


def explain(error: ValidationError, content: Any) -> list[str]:
    """Returns one line for each problem: where, what is wanted, what was given."""
    return [_explain(problem["loc"], problem["msg"], problem["input"], content) for problem in error.errors()]


def _explain(loc: tuple[int | str, ...], message: str, given: Any, content: Any) -> str:
    where = _address(loc, content)
    shown = "" if isinstance(given, dict) else f", got {given!r}"
    return (f"{where}: " if where else "") + message.removeprefix("Value error, ") + shown


def _address(loc: tuple[int | str, ...], content: Any) -> str:
    """Returns the path in the user's own file: pydantic's also names the choice taken under `kind`."""
    parts: list[str] = []
    for part in loc:
        if isinstance(content, dict) and content.get("kind") == part and part not in content:
            continue
        parts.append(str(part))
        content = content.get(part) if isinstance(content, dict) else None
    return ".".join(parts)
