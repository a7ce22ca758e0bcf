"""What each call of the REST API sends and how its answer is read: the one place both clients take paths from."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote

from ngd_service.resources import EventPage, Health, Job, JobPage, Metrics, Statistics, Validated

__all__ = ["Call"]

Answer = TypeVar("Answer")
Spec = Mapping[str, Any] | str
PREFIX = "/api/v1"


@dataclass(frozen=True, slots=True)
class Call(Generic[Answer]):
    """One HTTP request and the reader of its body."""

    method: str
    path: str
    read: Callable[[bytes], Answer]
    params: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    json: Any = None
    content: bytes | None = None
    timeout_s: float | None = None


def _text(body: bytes) -> str:
    return body.decode("utf-8", errors="replace")


def _job(job_id: str) -> str:
    return f"{PREFIX}/jobs/{quote(job_id, safe='')}"


def _params(**values: object) -> dict[str, str]:
    return {name: str(value) for name, value in values.items() if value is not None}


def _with_spec(spec: Spec) -> dict[str, Any]:
    if isinstance(spec, str):  # text travels as it is, so that the service's messages name the user's own lines
        return {"content": spec.encode(), "headers": {"Content-Type": _media_type(spec)}}
    return {"json": dict(spec)}


def _media_type(text: str) -> str:
    """Returns JSON's for what is JSON: a reader of YAML takes some of its texts and numbers for others."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return "application/yaml"
    return "application/json"


def submit(spec: Spec, idempotency_key: str) -> Call[Job]:
    body = _with_spec(spec)
    headers = body.pop("headers", {}) | {"Idempotency-Key": idempotency_key}
    return Call("POST", f"{PREFIX}/jobs", Job.model_validate_json, headers=headers, **body)


def validate(spec: Spec) -> Call[Validated]:
    params = {"validate_only": "true"}
    return Call("POST", f"{PREFIX}/jobs", Validated.model_validate_json, params=params, **_with_spec(spec))


def list_jobs(page_size: int | None, page_token: str | None, phase: str | None) -> Call[JobPage]:
    params = _params(page_size=page_size, page_token=page_token, phase=phase)
    return Call("GET", f"{PREFIX}/jobs", JobPage.model_validate_json, params=params)


def get(job_id: str) -> Call[Job]:
    return Call("GET", f"{_job(job_id)}", Job.model_validate_json)


def wait(job_id: str, timeout_s: float) -> Call[Job]:
    params = _params(wait_for="terminal", timeout_s=timeout_s)
    return Call("GET", f"{_job(job_id)}", Job.model_validate_json, params=params, timeout_s=timeout_s + 10)


def cancel(job_id: str) -> Call[Job]:
    return Call("POST", f"{_job(job_id)}:cancel", Job.model_validate_json)


def events(job_id: str, after: int, limit: int, newest_of: Iterable[str]) -> Call[EventPage]:
    params = _params(after=after, limit=limit, newest_of=",".join(newest_of) or None)
    return Call("GET", f"{_job(job_id)}/events", EventPage.model_validate_json, params=params)


def metrics(job_id: str, names: Iterable[str], from_step: int, to_step: int | None, max_points: int) -> Call[Metrics]:
    params = _params(names=",".join(names) or None, from_step=from_step, to_step=to_step, max_points=max_points)
    return Call("GET", f"{_job(job_id)}/metrics", Metrics.model_validate_json, params=params)


def statistics(job_id: str, from_step: int, max_points: int, span: int) -> Call[Statistics]:
    params = _params(from_step=from_step, max_points=max_points, span=span)
    return Call("GET", f"{_job(job_id)}/statistics", Statistics.model_validate_json, params=params)


def logs(job_id: str, attempt: int | None, tail: int | None, rank: int | None) -> Call[str]:
    return Call("GET", f"{_job(job_id)}/logs", _text, params=_params(attempt=attempt, tail=tail, rank=rank))


def ready() -> Call[Health]:
    return Call("GET", "/readyz", Health.model_validate_json)


def event_stream(job_id: str, after: int) -> tuple[str, dict[str, str]]:
    """Returns path and headers of the event stream that goes on after event `after`."""
    return f"{_job(job_id)}/events/stream", {"Last-Event-ID": str(after)} if after else {}


def log_stream(job_id: str, attempt: int | None, tail: int | None, rank: int | None) -> tuple[str, dict[str, str]]:
    """Returns path and parameters of the stream of an attempt's log."""
    return f"{_job(job_id)}/logs", _params(attempt=attempt, tail=tail, rank=rank, follow="true")


def log_file(job_id: str, attempt: int | None, rank: int | None) -> tuple[str, dict[str, str]]:
    """Returns path and parameters of all that is kept of an attempt's log, as it was written."""
    return f"{_job(job_id)}/logs", _params(attempt=attempt, rank=rank, download="true")
