"""A form of the settings of a job that most jobs set, made from the JSON schema of its spec; the text has them all."""

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from nicegui import ui

from ngd_service.resources import ProblemItem
from ngd_workers.contract.spec import spec_class
from ngd_workers.contract.spec_file import parse_yaml

__all__ = ["Setting", "SpecForm", "foreign", "settings_of"]

# By the heading they stand under. A choice (model, data, ...) brings its kind and what this kind can't do without.
SHOWN = {
    "Job": ("name", "seed"),
    "Code": ("code.directory", "code.requirements"),
    "Model": ("model", "init_from"),
    "Loop": ("train.function", "train.steps"),
    "Data": ("data", "task"),
    "Optimizer": ("optimizer", "optimizer.lr", "optimizer.momentum", "optimizer.damping", "precision"),
    "Length": ("schedule.epochs", "schedule.steps", "schedule.warmup_steps", "schedule.evaluate_every_steps"),
    "Batch": ("batch.global_size", "batch.micro_size"),
    "Workers": ("resources.workers", "resources.gpus_per_worker", "resources.threads_per_worker"),
    "Checkpoints": ("checkpoint.every_steps", "checkpoint.keep"),
    "Target": ("target.metric", "target.value", "target.stop"),
}
IF_GIVEN = ("code", "init_from")  # parts that few jobs have
EXTRA = {"init_from": ("step", "takes")}
SCALARS = ("string", "integer", "number", "boolean")
DIGITS = ("integer", "number")

Change = Callable[[Sequence[str], object], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of the form. options: the values that it may have; empty: any of its type."""

    group: str
    path: tuple[str, ...]
    options: tuple[Any, ...]
    default: Any
    is_required: bool
    is_number: bool
    description: str

    @property
    def pointer(self) -> str:
        """The JSON Pointer to its value."""
        return "".join(f"/{name}" for name in self.path)

    @property
    def label(self) -> str:
        """Its name in words; that of the choice, if it is a kind."""
        return self.path[-2 if self.path[-1] == "kind" else -1].replace("_", " ")

    def value_in(self, spec: object) -> Any:
        """Returns its value in the spec; None: not given."""
        for name in self.path:
            spec = spec.get(name) if isinstance(spec, Mapping) else None
        return spec


def settings_of(spec: Mapping[str, Any]) -> list[Setting]:
    """Returns the settings that the form has for this spec, whose kinds decide on some of them."""
    schema = _schema(spec_class(dict(spec)))
    settings: list[Setting] = []
    for group, names in SHOWN.items():
        for name in names:
            path = tuple(name.split("."))
            if path[0] not in IF_GIVEN or spec.get(path[0]):
                settings += _settings(schema, group, path, spec)
    return settings


def foreign(spec: Mapping[str, Any], path: Sequence[str], kind: str) -> list[tuple[str, ...]]:
    """Returns the settings of a part that its choice of this kind does not have. path: of the part."""
    schema = _schema(spec_class(dict(spec)))
    node, part = schema, dict(spec)
    for name in path:
        node = _resolved(schema, node, part).get("properties", {}).get(name, {})
        inner = part.get(name)
        part = inner if isinstance(inner, dict) else {}
    known = _resolved(schema, node, {"kind": kind}).get("properties", {})
    return [(*path, name) for name in part if name not in known]


@cache
def _schema(model: Any) -> dict[str, Any]:
    schema: dict[str, Any] = model.model_json_schema()
    return schema


def _settings(schema: dict[str, Any], group: str, path: tuple[str, ...], spec: object) -> Iterator[Setting]:
    node, is_required = schema, True
    for name in path:
        part = _resolved(schema, node, spec)
        node = part.get("properties", {}).get(name, {})
        if not node:
            return
        is_required = is_required and name in part.get("required", ())
        spec = spec.get(name) if isinstance(spec, Mapping) else None
    mapping = _without_null(node).get("discriminator", {}).get("mapping")
    if mapping is None:
        yield from _leaf(node, group, path, is_required=is_required)
        return
    default = (node.get("default") or {}).get("kind")
    description = node.get("description", "")
    yield Setting(group, (*path, "kind"), tuple(mapping), default, default is None, False, description)
    chosen = _resolved(schema, node, spec)
    for name in (*chosen.get("required", ()), *EXTRA.get(path[-1], ())):
        leaf = chosen.get("properties", {}).get(name)
        if leaf is not None and name != "kind":
            yield from _leaf(leaf, group, (*path, name), is_required=name in chosen.get("required", ()))


def _leaf(node: dict[str, Any], group: str, path: tuple[str, ...], *, is_required: bool) -> Iterator[Setting]:
    plain = _without_null(node)
    if plain.get("type") in SCALARS:
        options = (True, False) if plain["type"] == "boolean" else tuple(plain.get("enum", ()))
        is_number = plain["type"] in DIGITS
        yield Setting(group, path, options, node.get("default"), is_required, is_number, node.get("description", ""))


def _without_null(node: dict[str, Any]) -> dict[str, Any]:
    members = [one for one in node.get("anyOf", ()) if one.get("type") != "null"]
    return members[0] if len(members) == 1 else node


def _resolved(schema: dict[str, Any], node: dict[str, Any], value: object) -> dict[str, Any]:
    """Returns the schema of an object: of a choice that of the value's kind, {} if it has none that is known."""
    node = _without_null(node)
    if "discriminator" in node:
        kind = value.get("kind") if isinstance(value, Mapping) else None
        kind = kind or (node.get("default") or {}).get("kind")
        node = {"$ref": node["discriminator"]["mapping"].get(str(kind))}
    if "$ref" in node:
        name = str(node["$ref"]).removeprefix("#/$defs/")
        return dict(schema["$defs"].get(name, {}))
    return node


class SpecForm:
    """The fields. change: called with the path of a setting and its new value; None: it is to have its default."""

    def __init__(self, change: Change) -> None:
        self._change = change
        self._settings: list[Setting] = []
        self._fields: dict[str, ui.input | ui.select] = {}
        self._is_showing = False
        self.place = ui.element("div").classes("spec-form")

    def show(self, spec: Mapping[str, Any]) -> None:
        """Shows the values of a spec; the fields are made again if it has others than the one before."""
        settings = settings_of(spec)
        self._is_showing = True
        if settings != self._settings:
            self._settings = settings
            self._lay_out()
        for setting in settings:
            field, value = self._fields[setting.pointer], setting.value_in(spec)
            if setting.options:
                effective = setting.default if value is None else value
                shown: Any = effective if effective in setting.options else None
            else:
                shown = "" if value is None else _text(value)
            if field.value != shown and {field.value, shown} != {None, ""}:
                field.set_value(shown)
        self._is_showing = False

    def tell(self, problems: Sequence[ProblemItem]) -> list[ProblemItem]:
        """Shows each problem at its field; returns those that have none here."""
        told: dict[str, list[str]] = {}
        rest = []
        for problem in problems:
            pointer = self._nearest(problem.pointer)
            if pointer is None:
                rest.append(problem)
            else:
                told.setdefault(pointer, []).append(problem.detail + (f" ({problem.hint})" if problem.hint else ""))
        for pointer, field in self._fields.items():
            field.error = "; ".join(told[pointer]) if pointer in told else None
        return rest

    def _nearest(self, pointer: str) -> str | None:
        """Returns the field of a problem: its own; of a choice that is missing its kind; of a part its first one."""
        if pointer in self._fields:
            return pointer
        if not pointer:
            return None
        return next((one for one in self._fields if one.startswith(f"{pointer}/")), None)

    def _lay_out(self) -> None:
        self.place.clear()
        self._fields.clear()
        groups = dict.fromkeys(setting.group for setting in self._settings)
        with self.place:
            for group in groups:
                with ui.element("fieldset"):
                    with ui.element("legend"):
                        ui.label(group)
                    for setting in self._settings:
                        if setting.group == group:
                            self._fields[setting.pointer] = self._field(setting)

    def _field(self, setting: Setting) -> ui.input | ui.select:
        field: ui.input | ui.select
        if setting.options:
            field = ui.select({option: _text(option) for option in setting.options}, label=setting.label)
            field.props("options-dense")
        else:
            field = ui.input(setting.label).props("debounce=400" + (" inputmode=decimal" if setting.is_number else ""))
            default = "not set" if setting.default is None else _text(setting.default)
            field.props["placeholder"] = "required" if setting.is_required else default
        field.props("dense outlined no-error-icon stack-label")
        field.props["title"] = f"{'.'.join(setting.path)}. {setting.description}"
        field.on_value_change(lambda event: None if self._is_showing else self._changed(setting, event.value))
        return field

    async def _changed(self, setting: Setting, given: Any) -> None:
        value = given if setting.options else _value(given, is_number=setting.is_number)
        if setting.path[-1] != "kind" and value == setting.default:
            value = None
        await self._change(setting.path, value)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _value(text: str | None, *, is_number: bool) -> object:
    """Returns what was typed: a number where one is wanted and YAML reads one, else the text; None: nothing."""
    text = (text or "").strip()
    if not text or not is_number:
        return text or None
    try:
        read = parse_yaml(text.encode())
    except ValueError:
        return text
    return read if isinstance(read, int | float) and not isinstance(read, bool) else text
