"""Turns what is wrong with a request into the API's problems."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ngd_service.errors import InvalidSpecError
from ngd_service.resources import ProblemItem
from ngd_workers.contract import spec_problems
from ngd_workers.contract.spec import AnySpec
from ngd_workers.contract.spec_problems import SpecProblemsError, cut, rule, shown

__all__ = ["explain_parameter", "parse_spec", "refuse_image", "refuse_secrets", "refuse_unlisted", "refused"]


LISTED = "the operator of the service lists modules with NGD_FUNCTION_MODULES"


def parse_spec(value: object) -> AnySpec:
    """Returns the spec. Raises: InvalidSpecError that lists each thing that is wrong."""
    with refused():
        return spec_problems.parse_spec(value)


@contextmanager
def refused() -> Iterator[None]:
    """Raises the problems of a spec, or of a request around one, as an InvalidSpecError."""
    try:
        yield
    except SpecProblemsError as error:
        items = [ProblemItem(**asdict(problem)) for problem in error.problems]
        raise InvalidSpecError(str(error), items) from error


def refuse_unlisted(spec: AnySpec, modules: Collection[str] | None) -> None:
    """Lets a spec pass whose functions are in these modules, or below them; None: any.

    Code, an image and variables of the user's own are refused then: a list would mean nothing beside them.
    Raises: InvalidSpecError that lists each function that is not.
    """
    if modules is None:
        return
    if given := [name for name in ("code", "image", "env") if getattr(spec, name)]:
        detail = (
            f"{' and '.join(given)} must be left out: this service runs functions of the modules "
            f"{', '.join(modules) or '(none)'} alone"
        )
        item = ProblemItem(pointer=f"/{given[0]}", code="code_not_taken", detail=detail, hint=LISTED)
        raise InvalidSpecError(detail, [item])
    items = [
        ProblemItem(
            pointer=f"/{'/'.join(path)}",
            code="function_not_listed",
            detail=f"{'.'.join(path)} must be of the modules {', '.join(modules)}, got {shown(address)}",
            hint=LISTED,
        )
        for path, address in _functions(spec)
        if not any(f"{address.partition(':')[0]}.".startswith(f"{name}.") for name in modules)
    ]
    if items:
        raise InvalidSpecError("; ".join(item.detail for item in items), items)


def refuse_secrets(spec: AnySpec, folder: Path | None) -> None:
    """Lets a spec pass that names no secret, or if there is a folder of them. Raises: InvalidSpecError."""
    if spec.secrets and folder is None:
        detail = f"secrets must be left out: this service has none, got {', '.join(sorted(set(spec.secrets.values())))}"
        hint = "the operator of the service gives it a folder of secrets with NGD_SECRETS_DIR"
        raise InvalidSpecError(detail, [ProblemItem(pointer="/secrets", code="no_secrets", detail=detail, hint=hint)])


def refuse_image(spec: AnySpec, *, is_taken: bool) -> None:
    """Lets a spec pass that names no image, or if attempts are given theirs. Raises: InvalidSpecError."""
    if spec.image is not None and not is_taken:
        detail = f"image must be left out: the workers of this service run where they are installed, got {spec.image}"
        hint = "list packages in code.requirements; a service with NGD_DISPATCHER=kuberay takes images"
        raise InvalidSpecError(detail, [ProblemItem(pointer="/image", code="no_images", detail=detail, hint=hint)])


def _functions(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields the path and the address of each function that a spec names, in whichever part."""
    match value:
        case BaseModel():
            for name in type(value).model_fields:
                part = getattr(value, name)
                if name == "function" and isinstance(part, str):
                    yield (*path, name), part
                else:
                    yield from _functions(part, (*path, name))
        case list() | tuple():
            for index, part in enumerate(value):
                yield from _functions(part, (*path, str(index)))


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
