"""The body of POST /jobs: a JobSpec as JSON or YAML."""

import json
from typing import Annotated, Any

import yaml
from fastapi import Depends, Request

from service.errors import MalformedBodyError, UnsupportedMediaError
from service.validation import parse_spec
from workers.spec import JobSpec

__all__ = ["SPEC_BODY", "SpecBody"]

YAML_TYPES = ("application/yaml", "application/x-yaml", "text/yaml")
SPEC_SCHEMA = {"$ref": "#/components/schemas/JobSpec"}
SPEC_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": SPEC_SCHEMA}, "application/yaml": {"schema": SPEC_SCHEMA}},
    }
}


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: a few lines of nested ones stand for billions of values."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.get_mark()
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read", problem_mark=mark)
        return super().compose_node(parent, index)


async def _read_spec(request: Request) -> JobSpec:
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type == "application/json":
        return parse_spec(_json(await request.body()))
    if media_type in YAML_TYPES:
        return parse_spec(_yaml(await request.body()))
    raise UnsupportedMediaError(
        f"Content-Type must be application/json or application/yaml, got {media_type!r}; send one of them"
    )


SpecBody = Annotated[JobSpec, Depends(_read_spec)]


def _json(body: bytes) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MalformedBodyError(f"the body is no JSON: {error}; YAML needs Content-Type: application/yaml") from error


def _yaml(body: bytes) -> object:
    try:
        return yaml.load(body, Loader=_PlainLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise MalformedBodyError(f"the body is no YAML: {error.problem}{where}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise MalformedBodyError(f"the body is no YAML: {reason}") from error
