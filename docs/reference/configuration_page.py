"""Writes docs/configuration.md from the classes of ngd_dist.config.

Run: python docs/reference/configuration_page.py > docs/configuration.md
"""

import inspect
import re
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ngd_dist.config import EnergyNGDConfig, NGDConfig, SNGDConfig

HEAD = """\
<!-- Written by docs/reference/configuration_page.py from ngd_dist/config: change it there. -->
# Configuration

Every setting is a field of `NGDConfig`. Where several methods can fill one field, each is a class with settings of its
own, told apart by `kind`; in Python give an instance, in a file a mapping:

```python
NGDConfig(
    lr=0.1,
    preconditioner=EKFAC(),
    damping_rule=ExponentialDamping(factor=0.5, every=100),
)
```

```yaml
lr: 0.1
preconditioner: {kind: ekfac}
damping_rule: {kind: exponential, factor: 0.5, every: 100}
```

An unknown field or a value out of bounds is an error. All classes are imported from `ngd_dist.config`.
"""
OF_TRANSFORMS = """\
## Transforms

Settings of methods that change the model, under an optimizer of your own: `SNGD(model, SNGDConfig(T=20))`, or
`transform` in a job.
"""
OF_EXACT = """\
## Small models

Settings of the natural gradient of a small model by one solve for all weights: `EnergyNGD(model, residuals,
EnergyNGDConfig(chunk=256))`.
"""
ROW_HEAD = "| field | values | default | what it decides |\n|---|---|---|---|"
SIGNS = {"ge": "&ge;", "gt": "&gt;", "le": "&le;", "lt": "&lt;"}


def page() -> str:
    """Returns the whole page: NGDConfig's fields, then for each field the classes that can fill it."""
    parts = [HEAD, "## NGDConfig\n", *_body(NGDConfig)]
    written: set[type[BaseModel]] = set()
    for name, field in NGDConfig.model_fields.items():
        if choices := _classes(field.annotation):
            parts.append(f"## {name}\n")
        for choice in choices:
            parts += _section(choice, "###", written)
    parts += [OF_TRANSFORMS, *_section(SNGDConfig, "###", written)]
    parts += [OF_EXACT, *_section(EnergyNGDConfig, "###", written)]
    return "\n".join(parts)


def _section(model: type[BaseModel], level: str, written: set[type[BaseModel]]) -> Iterator[str]:
    if model in written:
        return
    written.add(model)
    yield f"{level} {model.__name__}\n"
    yield from _body(model)
    for field in model.model_fields.values():
        for choice in _classes(field.annotation):
            yield from _section(choice, "####", written)


def _body(model: type[BaseModel]) -> Iterator[str]:
    if "kind" in model.model_fields:
        yield f"`kind: {model.model_fields['kind'].default}`\n"
    paragraphs = (inspect.getdoc(model) or "").split("\n\n")
    yield "\n\n".join(f"```pycon\n{p}\n```" if p.startswith(">>> ") else _escaped(p) for p in paragraphs) + "\n"
    rows = [_row(name, field) for name, field in model.model_fields.items() if name != "kind"]
    if rows:
        yield "\n".join([ROW_HEAD, *rows]) + "\n"


def _row(name: str, field: FieldInfo) -> str:
    cells = (f"`{name}`", _values(field), _default(field), _escaped(field.description or ""))
    return f"| {' | '.join(cells)} |"


def _values(field: FieldInfo) -> str:
    """Returns what the field may be: the literals, a link to each class, or the type and its bounds."""
    annotation = field.annotation
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if classes := _classes(annotation):
        return ", ".join(f"[{model.__name__}](#{model.__name__.lower()})" for model in classes)
    named = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return f"`{named}` {_bounds(field)}".strip()


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    return type(value).__name__ if isinstance(value, BaseModel) else f"`{value}`"


def _bounds(field: FieldInfo) -> str:
    return ", ".join(
        f"{sign} {getattr(bound, name)}"
        for bound in field.metadata
        for name, sign in SIGNS.items()
        if hasattr(bound, name)
    )


def _classes(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _classes(part)]


def _escaped(text: str) -> str:
    """Returns prose that neither HTML nor a table of Markdown takes for its own; code spans stay as they are."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"[*|]", r"\\\g<0>", p).replace("<", "&lt;") for p in parts)


def main() -> None:
    print(page(), end="")


if __name__ == "__main__":
    main()
