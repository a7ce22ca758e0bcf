"""Reads the spec of a job from YAML or JSON. Imports without torch.

YAML follows the 1.2 core schema: `steps: 010` is ten and `no` is a text. The reader takes the parser's events and no
aliases, so that a stranger's file can't expand beyond its own length.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml._yaml import CParser
from yaml.events import (
    AliasEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from ngd_workers.contract.errors import SpecError
from ngd_workers.contract.spec import AnySpec
from ngd_workers.contract.spec_problems import SpecProblemsError, parse_spec, quoted

__all__ = ["MAX_YAML_BYTES", "load_mapping", "load_spec", "parse_json", "parse_yaml"]

MAX_YAML_BYTES = 64 << 10  # 0.1 CPU seconds at worst; the recipes have less than 1 KiB
MAX_YAML_DEPTH = 32  # libyaml takes time in proportion to the square of the depth of [[[[
TAG = "tag:yaml.org,2002:"
# YAML 1.2.2, 10.3.2: the types of a plain scalar; every other one is a text.
CORE: dict[str, tuple[re.Pattern[str], Callable[[str], object]]] = {
    "null": (re.compile(r"null|Null|NULL|~|"), lambda _: None),
    "bool": (re.compile(r"true|True|TRUE|false|False|FALSE"), lambda text: text.lower() == "true"),
    "int": (
        re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
        lambda text: int(text[2:], 8 if text[1] == "o" else 16) if text[1:2] in ("o", "x") else int(text),
    ),
    "float": (
        re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?(\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN"),
        lambda text: float(re.sub(r"\.(?=[iInN])", "", text)),
    ),
    "str": (re.compile(r"(?s:.*)"), str),
}
JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:]')


def load_spec(path: Path) -> AnySpec:
    """Returns the spec in the file. Raises: SpecError with one line per problem."""
    try:
        return parse_spec(_contents(path))
    except SpecProblemsError as error:
        lines = "\n  ".join(str(problem) for problem in error.problems)
        raise SpecError(f"the spec {path} is invalid:\n  {lines}") from error


def load_mapping(path: Path) -> dict[str, Any]:
    """Returns what the file holds, unchecked. Raises: SpecError if that are not names with values."""
    contents = _contents(path)
    if not isinstance(contents, dict):
        raise SpecError(f"the spec {path} must hold names with values, got a {type(contents).__name__}")
    return contents


def parse_json(text: bytes) -> object:
    """Returns the value. Raises: ValueError that begins with "no JSON" and gives the place."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except DuplicateNameError as error:
        decoded = text.decode(json.detect_encoding(text))
        raise ValueError(f"no JSON: {error} at line {_line_of_duplicate(decoded)}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from error


def parse_yaml(text: bytes) -> object:
    """Returns the value. Raises: ValueError that begins with "no YAML" and gives the place."""
    if len(text) > MAX_YAML_BYTES:
        limit = f"its {len(text):,} bytes are more than the {MAX_YAML_BYTES:,} that are read"
        raise ValueError(f"no YAML: {limit}; give it as JSON, or put large data into a file of its own")
    try:
        return _document(CParser(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"no YAML: {error.problem}{where}") from error
    except (yaml.YAMLError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"no YAML: {reason}") from error


def _contents(path: Path) -> object:
    try:
        return _parse(path, path.read_bytes())
    except OSError as error:
        raise SpecError(f"can't read the spec {path}: {error.strerror}; give a YAML or JSON file") from error
    except ValueError as error:
        raise SpecError(f"the spec {path} is {error}") from error


def _parse(path: Path, text: bytes) -> object:
    if path.suffix == ".json":
        return parse_json(text)
    try:
        return parse_json(text)
    except ValueError:
        return parse_yaml(text)


class DuplicateNameError(ValueError):
    """A name stands twice in one object, so that its value is ambiguous."""

    def __init__(self, name: object) -> None:
        super().__init__(f"the name {quoted(name)} stands twice in one object; leave one out")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise DuplicateNameError(next(name for name, times in Counter(names).items() if times > 1))
    return fields


def _line_of_duplicate(text: str) -> int:
    """Returns the line of the first name that stands a second time in its object. text: JSON that has one."""
    objects: list[set[str]] = []
    last = ""
    for token in JSON_TOKEN.finditer(text):
        match token.group():
            case "{" | "[":
                objects.append(set())
            case "}" | "]":
                objects.pop()
            case ":":
                if last in objects[-1]:
                    return text.count("\n", 0, token.start()) + 1
                objects[-1].add(last)
            case string:
                last = json.loads(string)
    raise AssertionError("the text has a duplicate name")


def _document(parser: CParser) -> object:
    """Returns the value of the only document; None if the text is empty."""
    events = iter(parser.get_event, None)
    value: object = None
    documents = 0
    for event in events:
        if isinstance(event, DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise _marked("there is a second document; give each job a file of its own", event)
        elif isinstance(event, NodeEvent):
            value = _value(event, events, depth=0)
    return value


def _value(event: Event, events: Iterator[Event], depth: int) -> object:
    if isinstance(event, AliasEvent):
        raise _marked("aliases (*name) are not read; write the value again", event)
    if isinstance(event, ScalarEvent):
        return _scalar(event)
    assert isinstance(event, CollectionStartEvent)
    if depth == MAX_YAML_DEPTH:
        raise _marked(f"values may lie {MAX_YAML_DEPTH} levels deep, and one lies deeper; flatten them", event)
    if isinstance(event, SequenceStartEvent):
        _refuse_other_tag(event, "seq")
        items: list[object] = []
        while not isinstance(item := next(events), SequenceEndEvent):
            items.append(_value(item, events, depth + 1))
        return items
    _refuse_other_tag(event, "map")
    return _mapping(events, depth + 1)


def _mapping(events: Iterator[Event], depth: int) -> dict[object, object]:
    fields: dict[object, object] = {}
    while not isinstance(event := next(events), MappingEndEvent):
        if isinstance(event, CollectionStartEvent):
            raise _marked("a list or an object can't be a name; write a text", event)
        name = _value(event, events, depth)
        if name in fields:
            raise _marked(str(DuplicateNameError(name)), event)
        fields[name] = _value(next(events), events, depth)
    return fields


def _scalar(event: ScalarEvent) -> object:
    text: str = event.value
    is_plain, is_quoted = event.implicit
    if is_plain:
        return next(read(text) for pattern, read in CORE.values() if pattern.fullmatch(text))
    if is_quoted:
        return text
    kind = str(event.tag).removeprefix(TAG)
    if kind not in CORE:
        raise _marked(f"the tag {quoted(event.tag)} is not read; leave it out", event)
    pattern, read = CORE[kind]
    if not pattern.fullmatch(text):
        raise _marked(f"{quoted(text)} is no {kind}; leave the tag out", event)
    return read(text)


def _refuse_other_tag(event: CollectionStartEvent, kind: str) -> None:
    if event.tag not in (None, "!", TAG + kind):
        raise _marked(f"the tag {quoted(event.tag)} is not read; leave it out", event)


def _marked(problem: str, event: Event) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)  # type: ignore[arg-type]
