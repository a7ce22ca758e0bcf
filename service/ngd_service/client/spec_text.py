"""A job's file as text: written in the style of the recipes, and changed in one setting while the rest stays."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, SequenceNode

from ngd_workers.contract.spec_file import CORE, MAX_YAML_BYTES, parse_json, parse_yaml

__all__ = ["lines_of", "read", "with_setting", "without_setting", "written"]

WIDTH = 100  # of a part that is written on one line
PLAIN = re.compile(r"[A-Za-z_][\w./-]*(:[\w./-]+)*")
INDENT = "  "

Path = Sequence[str]
Entry = tuple[Node, Node]


def read(text: str) -> object:
    """Returns what the text holds, unchecked: JSON if it is that, else YAML. Raises: ValueError, with the place."""
    try:
        return parse_json(text.encode())
    except ValueError:
        return parse_yaml(text.encode())


def written(spec: Mapping[str, Any]) -> str:
    """Returns a spec as YAML: a part on one line where it has room.

    >>> written({"name": "digits", "batch": {"global_size": 128}})
    'name: digits\\nbatch: {global_size: 128}\\n'
    """
    return "".join(f"{line}\n" for line in _lines(spec, ""))


def with_setting(text: str, path: Path, value: object) -> str:
    """Returns the text with this value at the path; comments, order and the other values stay. Raises: ValueError.

    >>> with_setting("optimizer: {kind: sgd, lr: 1}  # large\\n", ["optimizer", "lr"], 0.1)
    'optimizer: {kind: sgd, lr: 0.1}  # large\\n'
    """
    wanted = _changed(read(text), path, value)
    return _kept(_Text(text).put(path, value), wanted)


def without_setting(text: str, path: Path) -> str:
    """Returns the text without the setting, which then has its default. Raises: ValueError.

    >>> without_setting("batch: {global_size: 8, micro_size: 4}\\n", ["batch", "micro_size"])
    'batch: {global_size: 8}\\n'
    """
    spec = read(text)
    if not _holds(spec, path):
        return text
    return _kept(_Text(text).cut(path), _changed(spec, path, None, is_cut=True))


def lines_of(text: str) -> dict[str, int]:
    """Returns the line, from 1 on, of each value by its JSON Pointer. Raises: ValueError for no YAML."""
    read(text)  # which bounds its depth
    root = _composed(text)
    return {} if root is None else {pointer: mark.line + 1 for pointer, mark in _places(root, "")}


def _places(node: Node, pointer: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, MappingNode):
        for key, value in node.value:
            below = f"{pointer}/{str(key.value).replace('~', '~0').replace('/', '~1')}"
            yield below, key.start_mark
            yield from _places(value, below)
    elif isinstance(node, SequenceNode):
        for index, item in enumerate(node.value):
            yield f"{pointer}/{index}", item.start_mark
            yield from _places(item, f"{pointer}/{index}")


def _composed(text: str) -> Node | None:
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"no YAML: it has {len(text):,} characters; above {MAX_YAML_BYTES:,} change the text itself")
    try:
        node: Node | None = yaml.compose(text, Loader=yaml.CSafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"no YAML: {str(error).splitlines()[0]}") from error
    return node


def _holds(spec: object, path: Path) -> bool:
    for name in path:
        if not isinstance(spec, dict) or name not in spec:
            return False
        spec = spec[name]
    return True


def _changed(spec: object, path: Path, value: object, *, is_cut: bool = False) -> dict[str, Any]:
    """Returns a copy of the spec with the value at the path, or without it; a part that becomes empty goes too."""
    fields = dict(spec) if isinstance(spec, dict) else {}
    name, *rest = path
    if rest:
        fields[name] = _changed(fields.get(name), rest, value, is_cut=is_cut)
        if is_cut and not fields[name]:
            del fields[name]
    elif is_cut:
        del fields[name]
    else:
        fields[name] = value
    return fields


def _kept(text: str, wanted: dict[str, Any]) -> str:
    """Returns the text if it holds what it should; else the spec written again, without its comments."""
    try:
        is_right = read(text) == wanted
    except ValueError:
        is_right = False
    return text if is_right else written(wanted)


@dataclass
class _Text:
    """A text whose pieces are replaced where the parser saw them."""

    text: str

    def put(self, path: Path, value: object) -> str:
        """Returns the text with the value at the path."""
        node, depth, entry = _composed(self.text), 0, None
        while isinstance(node, MappingNode) and depth < len(path):
            entry = next((each for each in node.value if each[0].value == path[depth]), None)
            if entry is None:
                return self._added(node, path[depth], _nested(path[depth + 1 :], value))
            node, depth = entry[1], depth + 1
        if node is None or entry is None:
            return written(_changed({}, path, value))
        return self._replaced(node, _nested(path[depth:], value))

    def cut(self, path: Path) -> str:
        """Returns the text without the entry at the path; a part that would be empty goes whole."""
        node, entries = _composed(self.text), list[tuple[MappingNode, int]]()
        for name in path:
            assert isinstance(node, MappingNode)
            place = next(i for i, (key, _) in enumerate(node.value) if key.value == name)
            entries.append((node, place))
            node = node.value[place][1]
        while len(entries) > 1 and len(entries[-1][0].value) == 1:
            entries.pop()
        return self._without(*entries[-1])

    def _without(self, node: MappingNode, place: int) -> str:
        key, value = node.value[place]
        if not node.flow_style:
            start = self.text.rfind("\n", 0, key.start_mark.index) + 1
            return self.text[:start] + self.text[self._end_of_line(value) + 1 :]
        if place:
            start, end = node.value[place - 1][1].end_mark.index, value.end_mark.index
        else:
            is_alone = len(node.value) == 1
            start = key.start_mark.index
            end = value.end_mark.index if is_alone else node.value[1][0].start_mark.index
        return self.text[:start] + self.text[end:]

    def _added(self, node: MappingNode, name: str, value: object) -> str:
        entry = f"{self._flow(name)}: {self._flow(value)}"
        if node.flow_style:
            at = node.value[-1][1].end_mark.index if node.value else node.start_mark.index + 1
            return self.text[:at] + (", " if node.value else "") + entry + self.text[at:]
        key, value_node = node.value[0][0], node.value[-1][1]
        at = self._end_of_line(value_node)
        return f"{self.text[:at]}\n{' ' * key.start_mark.column}{entry}{self.text[at:]}"

    def _replaced(self, node: Node, value: object) -> str:
        start, end = node.start_mark.index, node.end_mark.index
        old, space = self.text[start:end], " " if start == end else ""
        return self.text[:start] + space + self._flow(value) + ("\n" if old.endswith("\n") else "") + self.text[end:]

    def _end_of_line(self, node: Node) -> int:
        """Returns the end of the last line of a value, without the line's end."""
        while isinstance(node, MappingNode | SequenceNode) and not node.flow_style and node.value:
            last = node.value[-1]
            node = last[1] if isinstance(last, tuple) else last
        end = node.end_mark.index - (1 if self.text[: node.end_mark.index].endswith("\n") else 0)
        at = self.text.find("\n", end)
        return len(self.text) if at < 0 else at

    def _flow(self, value: object) -> str:
        return json.dumps(value, ensure_ascii=False) if self.text.lstrip().startswith("{") else _flow(value)


def _nested(path: Path, value: object) -> object:
    for name in reversed(path):
        value = {name: value}
    return value


def _lines(fields: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, value in fields.items():
        line = f"{indent}{_flow(name)}: {_flow(value)}"
        if len(line) <= WIDTH or not isinstance(value, Mapping) or not value:
            yield line
        else:
            yield f"{indent}{_flow(name)}:"
            yield from _lines(value, indent + INDENT)


def _flow(value: object) -> str:
    """Returns a value on one line; a text without quotes where YAML 1.2 reads it as a text."""
    match value:
        case Mapping():
            return "{" + ", ".join(f"{_flow(name)}: {_flow(part)}" for name, part in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(_flow, value)) + "]"
        case str():
            kind = next(name for name, (pattern, _) in CORE.items() if pattern.fullmatch(value))
            return value if kind == "str" and PLAIN.fullmatch(value) else json.dumps(value, ensure_ascii=False)
    return json.dumps(value)
