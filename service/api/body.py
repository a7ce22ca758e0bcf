"""The body of POST /jobs: a JobSpec as JSON or YAML."""

from typing import Annotated, Any

from fastapi import Depends, Request

from service.errors import MalformedBodyError, UnsupportedMediaError
from service.validation import parse_spec
from workers.spec import JobSpec
from workers.spec_file import parse_json, parse_yaml

__all__ = ["SPEC_BODY", "SpecBody"]

READERS = {
    "application/json": parse_json,
    "application/yaml": parse_yaml,
    "application/x-yaml": parse_yaml,
    "text/yaml": parse_yaml,
}
SPEC_SCHEMA = {"$ref": "#/components/schemas/JobSpec"}
SPEC_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": SPEC_SCHEMA}, "application/yaml": {"schema": SPEC_SCHEMA}},
    }
}


async def _read_spec(request: Request) -> JobSpec:
    # None is refused too: a page of another site can send a body without a type, unasked.
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in READERS:
        raise UnsupportedMediaError(
            f"Content-Type must be application/json or application/yaml, got {media_type!r}; send one of them"
        )
    try:
        value = READERS[media_type](await request.body())
    except ValueError as error:
        raise MalformedBodyError(f"the body is {error}; it was read as its Content-Type says, {media_type}") from error
    return parse_spec(value)


SpecBody = Annotated[JobSpec, Depends(_read_spec)]
