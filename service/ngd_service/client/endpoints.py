"""An HTTP request to the REST API and the reader of its answer."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote

__all__ = [
    "JOBS",
    "Endpoint",
    "Spec",
    "code_path",
    "job_path",
    "joined",
    "nothing",
    "params",
    "pin_path",
    "spec_body",
    "text",
]

Answer = TypeVar("Answer")
Spec = Mapping[str, Any] | str
JOBS = "/api/v1/jobs"


@dataclass(frozen=True, slots=True)
class Endpoint(Generic[Answer]):
    """One HTTP request and the reader of its body."""

    method: str
    path: str
    read: Callable[[bytes], Answer]
    params: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    json: Any = None
    content: bytes | None = None
    timeout_s: float | None = None


def job_path(job_id: str) -> str:
    """Returns the path of a job, with special characters of the id escaped."""
    return f"{JOBS}/{quote(job_id, safe='')}"


def code_path(sha256: str) -> str:
    """Returns the path of an archive of code."""
    return f"/api/v1/code/{sha256}"


def pin_path(job_id: str, step: int) -> str:
    """Returns the path of the pin of a job's checkpoint."""
    return f"{job_path(job_id)}/checkpoints/{step}/pin"


def nothing(body: bytes) -> None:
    """Reads an answer that has no body."""


def params(**values: object) -> dict[str, str]:
    """Returns the query parameters that are given."""
    return {name: str(value) for name, value in values.items() if value is not None}


def joined(names: Iterable[str]) -> str | None:
    """Returns the names as one query parameter; None: there are none, and the parameter is left out."""
    return ",".join(names) or None


def text(body: bytes) -> str:
    """Returns the body as text; bytes that are no UTF-8 become U+FFFD."""
    return body.decode("utf-8", errors="replace")


def spec_body(spec: Spec) -> dict[str, Any]:
    """Returns the arguments of an Endpoint that carry a spec."""
    if isinstance(spec, str):  # text travels as it is, so that the service's messages name the user's own lines
        return {"content": spec.encode(), "headers": {"Content-Type": _media_type(spec)}}
    return {"json": dict(spec)}


def _media_type(text: str) -> str:
    """Returns JSON's for text that is JSON: a reader of YAML takes some of its texts and numbers for others."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return "application/yaml"
    return "application/json"
