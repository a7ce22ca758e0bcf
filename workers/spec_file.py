"""Reads a JobSpec from YAML or JSON. Imports without torch."""

import json
import re
from pathlib import Path

import yaml

from workers.errors import SpecError
from workers.spec import JobSpec
from workers.spec_problems import SpecProblemsError, parse_spec

__all__ = ["load_spec", "parse_json", "parse_yaml"]


class _SpecLoader(yaml.SafeLoader):
    """YAML without aliases: a few lines of nested ones stand for billions of values."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.get_mark()
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read", problem_mark=mark)
        return super().compose_node(parent, index)


# YAML 1.1 wants a point in a number with an exponent, and takes 1e-3 for a text.
_SpecLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_spec(path: Path) -> JobSpec:
    """Returns the spec in the file. Raises: SpecError with one line per problem."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise SpecError(f"can't read the spec {path}: {error.strerror}; give a YAML or JSON file") from error
    try:
        return parse_spec(_parse(text))
    except SpecProblemsError as error:
        lines = "\n  ".join(str(problem) for problem in error.problems)
        raise SpecError(f"the spec {path} is invalid:\n  {lines}") from error
    except ValueError as error:
        raise SpecError(f"the spec {path} is {error}") from error


def parse_json(text: bytes) -> object:
    """Returns the value. Raises: ValueError that begins with "no JSON"."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from error


def parse_yaml(text: bytes) -> object:
    """Returns the value. Raises: ValueError that begins with "no YAML" and says where."""
    try:
        return yaml.load(text, Loader=_SpecLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"no YAML: {error.problem}{where}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"no YAML: {reason}") from error


def _parse(text: bytes) -> object:
    try:
        return parse_json(text)
    except ValueError:
        return parse_yaml(text)
