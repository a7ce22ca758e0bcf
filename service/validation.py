"""Turns what is wrong with a request into the API's problems."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from service.errors import InvalidSpecError
from service.resources import ProblemItem
from workers import spec_problems
from workers.spec import JobSpec
from workers.spec_problems import SpecProblemsError, cut, rule, shown

__all__ = ["explain_parameter", "parse_spec"]


def parse_spec(value: object) -> JobSpec:
    """Returns the spec. Raises: InvalidSpecError that lists each thing that is wrong."""
    try:
        return spec_problems.parse_spec(value)
    except SpecProblemsError as error:
        items = [ProblemItem(**asdict(problem)) for problem in error.problems]
        raise InvalidSpecError(str(error), items) from error


def explain_parameter(error: Mapping[str, Any]) -> ProblemItem:
    """Returns the item for one thing that is wrong with a parameter, or with the body of an internal route."""
    _, *path = error["loc"]
    name = ".".join(cut(str(part)) for part in path) or "the body"
    if error["type"] == "missing":
        return ProblemItem(pointer=name, code="missing", detail=f"{name} is missing")
    code, must = rule(error["type"], error.get("ctx", {}), error["msg"])
    is_shown = "input" in error and not isinstance(error["input"], dict | list)  # those may be megabytes long
    got = f", got {shown(error['input'])}" if is_shown else ""
    return ProblemItem(pointer=name, code=code, detail=f"{name} {must}{got}")
