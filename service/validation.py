"""Turns what pydantic says of a bad input into what a person can act on: what, the value, the bound, what to do."""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from service.errors import InvalidSpecError
from service.resources import ProblemItem
from workers.spec import JobSpec

__all__ = ["did_you_mean", "explain", "explain_parameter", "parse_spec"]

SHOWN_CHARACTERS = 80  # of a value in a message
BOUNDS = {
    "greater_than": "must be > {gt:g}",
    "greater_than_equal": "must be >= {ge:g}",
    "less_than": "must be < {lt:g}",
    "less_than_equal": "must be <= {le:g}",
    "finite_number": "must be a finite number",
}
CHOICES = {"literal_error": "must be {expected}", "string_pattern_mismatch": "must match {pattern}"}
TYPES = {
    "int": "must be a whole number",
    "float": "must be a number",
    "string": "must be a text",
    "bool": "must be true or false",
    "dict": "must be an object of fields",
    "model": "must be an object of fields",
    "model_attributes": "must be an object of fields",
    "list": "must be a list",
    "tuple": "must be a list",
}


def parse_spec(value: object) -> JobSpec:
    """Returns the spec. Raises: InvalidSpecError that lists each thing that is wrong."""
    if not isinstance(value, dict):
        raise InvalidSpecError(f"a job must be an object of fields, got {_shown(value)}; see the recipes for examples")
    try:
        return JobSpec.model_validate(value)
    except ValidationError as error:
        items = list(explain(error, JobSpec))
        raise InvalidSpecError("; ".join(item.detail for item in items), items) from error


def did_you_mean(given: str, known: Iterable[str]) -> str | None:
    """Returns "did you mean ...?" if one of the known names is close to the given one."""
    close = difflib.get_close_matches(given, [str(name) for name in known], n=1)
    return f"did you mean {close[0]!r}?" if close else None


def explain(error: ValidationError, model: type[BaseModel]) -> Iterator[ProblemItem]:
    """Yields one item for each thing that is wrong with a `model`."""
    for item in error.errors(include_url=False):
        yield _explain(item, _Place.of(item["loc"], model))


def explain_parameter(error: Mapping[str, Any]) -> ProblemItem:
    """Returns the item for one thing that is wrong with a parameter, or with the body of an internal route."""
    _, *path = error["loc"]
    name = ".".join(str(part) for part in path) or "the body"
    if error["type"] == "missing":
        return ProblemItem(pointer=name, code="missing", detail=f"{name} is missing")
    code, rule = _rule(error["type"], error.get("ctx", {}), error["msg"])
    return ProblemItem(pointer=name, code=code, detail=f"{name} {rule}, got {_shown(error['input'])}")


class _Place:
    """Where an error lies: the path as the user wrote it, and the models that may stand there."""

    def __init__(self, model: type[BaseModel]) -> None:
        self.path: list[str | int] = []
        self.models: list[type[BaseModel]] = [model]
        self.siblings: list[str] = []
        self.field: FieldInfo | None = None

    @classmethod
    def of(cls, loc: Sequence[str | int], model: type[BaseModel]) -> "_Place":
        place = cls(model)
        for part in loc:
            chosen = [member for member in place.models if _kind(member) == part]
            if chosen and len(place.models) > 1:  # pydantic names the chosen member of a union; the user did not
                place.models = chosen
            else:
                place._enter(part)
        return place

    def _enter(self, part: str | int) -> None:
        self.path.append(part)
        fields = self.models[0].model_fields if self.models else {}
        self.siblings = sorted(fields)
        self.field = fields.get(str(part))
        self.models = list(_models_in(self.field.annotation)) if self.field else []

    @property
    def name(self) -> str:
        return ".".join(str(part) for part in self.path)

    def item(self, code: str, detail: str, hint: str | None = None) -> ProblemItem:
        pointer = "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in self.path)
        return ProblemItem(pointer=pointer, code=code, detail=detail, hint=hint)


def _explain(error: Mapping[str, Any], place: _Place) -> ProblemItem:
    kind, ctx = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_field(place)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _unknown_kind(place, ctx.get("tag"))
    if kind == "missing":
        return place.item("missing", f"{place.name} is missing", _advice(place))
    if kind == "value_error":
        prefix = f"{place.name}: " if place.path else ""
        return place.item("invalid", prefix + str(ctx["error"]))
    code, rule = _rule(kind, ctx, error["msg"])
    return place.item(code, f"{place.name} {rule}, got {_shown(error['input'])}", _advice(place))


def _rule(kind: str, ctx: Mapping[str, Any], message: str) -> tuple[str, str]:
    if kind in BOUNDS:
        return "out_of_range", BOUNDS[kind].format(**ctx)
    if kind in CHOICES:
        return "invalid_choice", CHOICES[kind].format(**ctx)
    type_name = kind.removesuffix("_type").removesuffix("_parsing").removesuffix("_from_float")
    if type_name in TYPES:
        return "wrong_type", TYPES[type_name]
    return "invalid", message[:1].lower() + message[1:]


def _unknown_field(place: _Place) -> ProblemItem:
    *parents, name = place.path
    where = ".".join(str(part) for part in parents) or "a job"
    hint = did_you_mean(str(name), place.siblings) or f"its fields are {', '.join(place.siblings)}"
    return place.item("unknown_field", f"{where} has no field {str(name)!r}", hint)


def _unknown_kind(place: _Place, given: object) -> ProblemItem:
    known = [kind for kind in map(_kind, place.models) if kind]
    choices = ", ".join(known)
    place.path.append("kind")
    if given is None:
        return place.item("missing", f"{place.name} is missing", f"it is one of {choices}")
    detail = f"{place.name} must be one of {choices}, got {_shown(given)}"
    return place.item("unknown_kind", detail, did_you_mean(str(given), known))


def _advice(place: _Place) -> str | None:
    """Returns the field's description and its default, as far as it has them."""
    if place.field is None:
        return None
    parts = [] if place.field.description is None else [place.field.description]
    if not place.field.is_required() and isinstance(place.field.default, bool | int | float | str):
        parts.append(f"The default is {_shown(place.field.default)}.")
    return " ".join(parts) or None


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _kind(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    return None if field is None else str(field.default)


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
