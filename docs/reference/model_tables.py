"""Tables of the fields of pydantic classes, for the pages that are written from them."""

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

__all__ = ["body", "classes", "escaped", "section"]

ROW_HEAD = "| field | values | default | what it decides |\n|---|---|---|---|"
SIGNS = {"ge": "&ge;", "gt": "&gt;", "le": "&le;", "lt": "&lt;"}


def section(
    model: type[BaseModel],
    level: str,
    written: set[type[BaseModel]],
    example: Callable[[type[BaseModel]], str] | None = None,
    elsewhere: Mapping[type[BaseModel], str] | None = None,
) -> Iterator[str]:
    """Yields the paragraphs on a class, and on those that can fill its fields.

    written: classes that the page has already; it grows. example: returns the paragraph that ends a section. elsewhere:
    the pages that have a class, which are linked to.
    """
    if model in written or model in (elsewhere or {}):
        return
    written.add(model)
    yield f"{level} {model.__name__}\n"
    yield from body(model, elsewhere)
    if example is not None:
        yield example(model)
    for field in model.model_fields.values():
        for choice in classes(field.annotation):
            yield from section(choice, "####" if example is None else level, written, example, elsewhere)


def body(
    model: type[BaseModel], elsewhere: Mapping[type[BaseModel], str] | None = None, hidden: Collection[str] = ("kind",)
) -> Iterator[str]:
    """Yields the docstring of a class, and the table of its fields but the hidden ones."""
    if "kind" in model.model_fields:
        yield f"`kind: {model.model_fields['kind'].default}`\n"
    paragraphs = (inspect.getdoc(model) or "").split("\n\n")
    yield "\n\n".join(f"```pycon\n{p}\n```" if p.startswith(">>> ") else escaped(p) for p in paragraphs) + "\n"
    rows = [table_row(name, field, elsewhere or {}) for name, field in model.model_fields.items() if name not in hidden]
    if rows:
        yield "\n".join([ROW_HEAD, *rows]) + "\n"


def table_row(name: str, field: FieldInfo, elsewhere: Mapping[type[BaseModel], str]) -> str:
    choices = classes(field.annotation)
    of_class = inspect.getdoc(choices[0]) if len(choices) == 1 else ""
    meaning = described(field) or (of_class or "").partition("\n\n")[0].replace("\n", " ")
    cells = (f"`{name}`", values(field, elsewhere), default(field), escaped(meaning))
    return f"| {' | '.join(cells)} |"


def described(field: FieldInfo) -> str:
    """Returns the description of a field, or of the type in it: Annotated[str, Field(description=...)] | None."""
    inner = [note for part in get_args(field.annotation) for note in getattr(part, "__metadata__", ())]
    found = [field.description, *(note.description for note in inner if isinstance(note, FieldInfo))]
    return next(filter(None, found), "")


def values(field: FieldInfo, elsewhere: Mapping[type[BaseModel], str]) -> str:
    """Returns what the field may be: the literals, a link to each class, or the type and its bounds."""
    annotation = field.annotation
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if choices := classes(annotation):
        links = [f"[{model.__name__}]({elsewhere.get(model, '')}#{model.__name__.lower()})" for model in choices]
        return ", ".join(links)
    return f"`{type_name(annotation)}` {bounds(field)}".strip()


def type_name(annotation: Any) -> str:
    """Returns the type as a person writes it, without the bounds that pydantic keeps in it."""
    parts = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return type_name(parts[0])
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(map(type_name, parts))
    if get_origin(annotation) is Literal:
        return " or ".join(map(repr, parts))
    name = "None" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))
    return f"{name}[{', '.join('...' if part is ... else type_name(part) for part in parts)}]" if parts else name


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    return type(value).__name__ if isinstance(value, BaseModel) else f"`{value}`" if value != "" else "empty"


def bounds(field: FieldInfo) -> str:
    return ", ".join(
        f"{sign} {getattr(bound, name)}"
        for bound in field.metadata
        for name, sign in SIGNS.items()
        if hasattr(bound, name)
    )


def classes(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in classes(part)]


def escaped(text: str) -> str:
    """Returns prose that neither HTML nor a table of Markdown takes for its own; code spans stay as they are."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"[*|]", r"\\\g<0>", p).replace("<", "&lt;") for p in parts)
