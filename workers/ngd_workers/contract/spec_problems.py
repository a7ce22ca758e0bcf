"""Words the problems of a spec for a person: the field, its value, the bound and the remedy.

`ngd submit`, `ngd train` and the driver use the same words for the same spec. Imports without torch.
"""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ngd_workers.contract.spec import AnySpec, spec_class

__all__ = [
    "MAX_PROBLEMS",
    "SHOWN_CHARACTERS",
    "SpecProblem",
    "SpecProblemsError",
    "cut",
    "did_you_mean",
    "explain",
    "parse_spec",
    "quoted",
    "rule",
    "shown",
]

SHOWN_CHARACTERS = 80  # of a value in a message
MAX_PROBLEMS = 50  # in one answer: a body may have thousands, and each takes time to word
MAX_VALUES = 10_000  # in a job: numbers, texts, lists and objects; each may be a separate problem
BOUNDS = {
    "greater_than": "must be > {gt}",
    "greater_than_equal": "must be >= {ge}",
    "less_than": "must be < {lt}",
    "less_than_equal": "must be <= {le}",
    "finite_number": "must be a finite number",
}
CHOICES = {"literal_error": "must be {expected}", "string_pattern_mismatch": "must match {pattern}"}
TYPES = {
    "int": "must be a whole number",
    "float": "must be a number",
    "string": "must be a text",
    "invalid_key": "must be a text",
    "string_unicode": "must be valid Unicode",
    "bool": "must be true or false",
    "dict": "must be an object of fields",
    "model": "must be an object of fields",
    "model_attributes": "must be an object of fields",
    "list": "must be a list",
    "tuple": "must be a list",
}


@dataclass(frozen=True, slots=True)
class SpecProblem:
    """One problem of a spec. pointer: JSON Pointer to the value; code: a word for machines; hint: the remedy."""

    pointer: str
    code: str
    detail: str
    hint: str | None = None

    def __str__(self) -> str:
        return self.detail + (f" ({self.hint})" if self.hint else "")


class SpecProblemsError(ValueError):
    """All problems of a spec."""

    def __init__(self, problems: Sequence[SpecProblem]) -> None:
        super().__init__("; ".join(problem.detail for problem in problems))
        self.problems = list(problems)


def parse_spec(value: object) -> AnySpec:
    """Returns the spec. Types are strict: neither a text nor true counts as a number.

    Raises: SpecProblemsError, which lists every problem.
    """
    if not isinstance(value, dict):
        detail = f"a job must be an object of fields, got {shown(value)}; see the recipes for examples"
        raise SpecProblemsError([SpecProblem("", "wrong_type", detail)])
    if _holds_too_many(value):
        detail = f"a job may hold {MAX_VALUES:,} values, and this one holds more; put large data into a file"
        raise SpecProblemsError([SpecProblem("", "too_many_values", detail)])
    try:
        return spec_class(value).model_validate(value, strict=True)
    except ValidationError as error:
        raise SpecProblemsError(list(explain(error, spec_class(value)))) from error


def _holds_too_many(value: object) -> bool:
    left, rest = MAX_VALUES, [value]
    while rest and left:
        left -= 1
        match rest.pop():
            case dict() as fields:
                rest.extend(fields.values())
            case list() as items:
                rest.extend(items)
    return bool(rest)


def did_you_mean(given: str, known: Iterable[str]) -> str | None:
    """Returns "did you mean ...?" if one of the known names is close to the given one."""
    if len(given) > SHOWN_CHARACTERS:
        return None
    close = difflib.get_close_matches(given, [str(name) for name in known], n=1)
    return f"did you mean {close[0]!r}?" if close else None


def explain(error: ValidationError, model: type[BaseModel]) -> Iterator[SpecProblem]:
    """Yields one problem for each error, up to MAX_PROBLEMS, and then one with the number of the others."""
    items = error.errors(include_url=False)
    for item in items[:MAX_PROBLEMS]:
        yield _explain(item, _Place.of(item["loc"], model))
    if len(items) > MAX_PROBLEMS:
        yield SpecProblem("", "more_problems", f"and {len(items) - MAX_PROBLEMS:,} more things are wrong")


class _Place:
    """The place of an error: the path as the user wrote it, and the models that may stand there."""

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
        return ".".join(cut(str(part)) for part in self.path)

    def item(self, code: str, detail: str, hint: str | None = None) -> SpecProblem:
        pointer = "".join("/" + cut(str(part)).replace("~", "~0").replace("/", "~1") for part in self.path)
        return SpecProblem(pointer=pointer, code=code, detail=detail, hint=hint)


def _explain(error: Mapping[str, Any], place: _Place) -> SpecProblem:
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
    code, must = rule(kind, ctx, error["msg"])
    given = error["input"]
    is_kind = isinstance(given, str) and given in map(_kind, place.models)
    hint = f"write {{kind: {given}}}" if is_kind else _advice(place)
    return place.item(code, f"{place.name or 'a job'} {must}, got {shown(given)}", hint)


def rule(kind: str, ctx: Mapping[str, Any], message: str) -> tuple[str, str]:
    """Returns a word for machines and the broken rule in words, for one of pydantic's kinds of error."""
    if kind in BOUNDS:
        return "out_of_range", BOUNDS[kind].format(**{name: _number(bound) for name, bound in ctx.items()})
    if kind in CHOICES:
        return "invalid_choice", CHOICES[kind].format(**ctx)
    type_name = kind.removesuffix("_type").removesuffix("_parsing").removesuffix("_from_float")
    if type_name in TYPES:
        return "wrong_type", TYPES[type_name]
    return "invalid", message[:1].lower() + message[1:]


def _number(bound: object) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)  # an integer in full, not as 1e+09


def _unknown_field(place: _Place) -> SpecProblem:
    *parents, name = place.path
    where = ".".join(cut(str(part)) for part in parents) or "a job"
    hint = did_you_mean(str(name), place.siblings) or f"its fields are {', '.join(place.siblings)}"
    return place.item("unknown_field", f"{where} has no field {quoted(name)}", hint)


def _unknown_kind(place: _Place, given: object) -> SpecProblem:
    known = [kind for kind in map(_kind, place.models) if kind]
    choices = ", ".join(known)
    place.path.append("kind")
    if given is None:
        return place.item("missing", f"{place.name} is missing", f"it is one of {choices}")
    detail = f"{place.name} must be one of {choices}, got {shown(given)}"
    return place.item("unknown_kind", detail, did_you_mean(str(given), known))


def _advice(place: _Place) -> str | None:
    """Returns the field's description and its default, if it has them."""
    if place.field is None:
        return None
    sentences = [] if place.field.description is None else [place.field.description]
    if not place.field.is_required() and isinstance(place.field.default, bool | int | float | str):
        sentences.append(f"The default is {shown(place.field.default)}.")
    return " ".join(sentences) or None


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _kind(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    return None if field is None else str(field.default)


def shown(value: object) -> str:
    """Returns the value as JSON, cut if it is long."""
    try:
        text = json.dumps(value, default=str)
    except (TypeError, ValueError, RecursionError):  # odd keys, thousands of digits or of levels
        text = f"a value of type {type(value).__name__}"
    return cut(text)


def quoted(name: object) -> str:
    """Returns the name between quotes, cut if it is long."""
    return repr(cut(str(name)))


def cut(text: str) -> str:
    """Returns the text, or its beginning if it is long."""
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
