"""Every error as application/problem+json, wherever it was raised, and the id of the request in each answer."""

import logging
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from ulid import ULID

from ngd_service.api.code import CODE_PREFIX
from ngd_service.api.internal import INTERNAL_PREFIX, MAX_BATCH_BYTES
from ngd_service.auth.access import LOGIN
from ngd_service.client.units import binary_bytes
from ngd_service.errors import (
    MAX_BODY_BYTES,
    BodyTooLargeError,
    InvalidParameterError,
    MalformedBodyError,
    ProblemError,
    as_problem,
    problem_of_status,
)
from ngd_service.resources import Problem
from ngd_service.validation import explain_parameter
from ngd_workers.contract.spec.code import MAX_ARCHIVE_BYTES

__all__ = ["MEDIA_TYPE", "PROBLEM_RESPONSES", "BodyLimit", "RequestId", "answer", "install"]

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
MAX_LOGIN_BYTES = 4 << 10  # a key, and the page to go to; anybody may send one
UPLOAD_PATH = re.compile(r"/_nicegui/client/[^/]+/upload/")  # of a page: code that the page packs and sends on
REQUEST_ID_PATTERN = re.compile(r"[\w.-]{1,64}")
PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {"default": {"model": Problem, "description": "What went wrong."}}


class RequestId:
    """Gives each request an id, or takes the caller's, and sends it back as X-Request-ID."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if REQUEST_ID_PATTERN.fullmatch(given) else f"req_{ULID()}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        return await self._app(scope, receive, send_with_id)


class BodyLimit:
    """Refuses bodies above a limit as they arrive; the framework's own limit answers in plain text."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        left = _limit(scope["path"])

        async def receive_some() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            return message

        return await self._app(scope, receive_some, send)


def _limit(path: str) -> int:
    if path.startswith(f"{CODE_PREFIX}/") or UPLOAD_PATH.match(path):
        return MAX_ARCHIVE_BYTES
    if path == LOGIN:
        return MAX_LOGIN_BYTES
    return MAX_BATCH_BYTES if path.startswith(f"{INTERNAL_PREFIX}/") else MAX_BODY_BYTES


def install(app: FastAPI) -> None:
    """Makes the app answer every error as a problem."""
    app.add_exception_handler(ProblemError, _on_problem)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_unexpected)


def answer(request: Request, error: ProblemError, headers: Mapping[str, str] | None = None) -> Response:
    """Returns the problem as the response to a request."""
    request_id = getattr(request.state, "request_id", f"req_{ULID()}")
    problem = as_problem(error, instance=request.url.path, request_id=request_id)
    merged = {"X-Request-ID": request_id, **error.headers, **(headers or {})}
    return Response(problem.model_dump_json(), status_code=problem.status, headers=merged, media_type=MEDIA_TYPE)


async def _on_problem(request: Request, error: Exception) -> Response:
    if not isinstance(error, ProblemError):
        raise error
    return answer(request, error)


async def _on_invalid(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    broken = next((item for item in error.errors() if item["type"] == "json_invalid"), None)
    if broken is not None:
        return answer(request, MalformedBodyError(f"the body is no JSON: {broken['ctx']['error']}"))
    items = [explain_parameter(item) for item in error.errors()]
    return answer(request, InvalidParameterError("; ".join(item.detail for item in items), items))


async def _on_http(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    return answer(request, _of_framework(request, HTTPStatus(error.status_code), str(error.detail)), error.headers)


async def _on_unexpected(request: Request, error: Exception) -> Response:
    log.error("request_failed method=%s path=%s", request.method, request.url.path, exc_info=error)
    detail = "the service made a mistake; its log tells more under this request_id"
    return answer(request, problem_of_status(HTTPStatus.INTERNAL_SERVER_ERROR, detail))


def _of_framework(request: Request, status: HTTPStatus, detail: str) -> ProblemError:
    match status:
        case HTTPStatus.NOT_FOUND:
            return problem_of_status(
                status, f"there is nothing at {request.url.path}; see /openapi.json for what there is"
            )
        case HTTPStatus.METHOD_NOT_ALLOWED:
            return problem_of_status(status, f"{request.url.path} does not take {request.method}; see the Allow header")
        case HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            limit = binary_bytes(_limit(request.url.path))
            return BodyTooLargeError(f"the body is larger than the {limit} that {request.url.path} takes")
    return problem_of_status(status, detail)
