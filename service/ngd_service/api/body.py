"""The body of POST /jobs, a job's spec as JSON or YAML; and where bodies are read."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request

from ngd_service.errors import BodyTooLargeError, MalformedBodyError, UnsupportedMediaError
from ngd_service.validation import parse_spec, refuse_image, refuse_secrets, refuse_unlisted
from ngd_workers.contract.spec import AnySpec
from ngd_workers.contract.spec_file import MAX_YAML_BYTES, parse_json, parse_yaml
from ngd_workers.contract.spec_problems import SHOWN_CHARACTERS

__all__ = ["SPEC_BODY", "SpecBody", "read_apart", "read_value"]

Value = TypeVar("Value")

READERS = {
    "application/json": parse_json,
    "application/yaml": parse_yaml,
    "application/x-yaml": parse_yaml,
    "text/yaml": parse_yaml,
}
SPEC_SCHEMA = {"anyOf": [{"$ref": "#/components/schemas/JobSpec"}, {"$ref": "#/components/schemas/LoopSpec"}]}
SPEC_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": SPEC_SCHEMA}, "application/yaml": {"schema": SPEC_SCHEMA}},
    }
}


# One thread for all: however many bodies are being read, the others share the processor with one of them.
READING = ThreadPoolExecutor(1, thread_name_prefix="body")


async def read_apart(parse: Callable[..., Value], *given: Any) -> Value:
    """Returns parse(*given) while the event loop answers others: a body may take a tenth of a second to read."""
    return await asyncio.get_running_loop().run_in_executor(READING, parse, *given)


async def read_value(request: Request) -> object:
    """Returns what the body holds, in JSON or in YAML. Raises: ProblemError."""
    # None is refused too: a page of another site can send a body without a type, unasked.
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in READERS:
        raise UnsupportedMediaError(
            f"Content-Type must be application/json or application/yaml, got {media_type[:SHOWN_CHARACTERS]!r}; send "
            "one of them"
        )
    body = await request.body()
    if READERS[media_type] is parse_yaml and len(body) > MAX_YAML_BYTES:
        raise BodyTooLargeError(
            f"the body has {len(body):,} bytes, and YAML is read up to {MAX_YAML_BYTES:,}; send it as JSON"
        )
    return await read_apart(_parse, media_type, body)


async def _read_spec(request: Request) -> AnySpec:
    spec = await read_apart(parse_spec, await read_value(request))
    settings = request.app.state.container.settings
    refuse_unlisted(spec, settings.function_modules)
    refuse_secrets(spec, settings.secrets_dir)
    refuse_image(spec, is_taken=settings.dispatcher_class.takes_images)
    return spec


def _parse(media_type: str, body: bytes) -> object:
    try:
        return READERS[media_type](body)
    except ValueError as error:
        raise MalformedBodyError(f"the body is {error}; it was read as its Content-Type says, {media_type}") from error


SpecBody = Annotated[AnySpec, Depends(_read_spec)]
