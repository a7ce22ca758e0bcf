"""Lets a request in only if it carries an API key or a session, when the service has keys."""

import logging
from urllib.parse import quote

from fastapi import Request
from starlette.datastructures import Headers
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from ngd_service.api.internal import INTERNAL_PREFIX
from ngd_service.api.problems import answer
from ngd_service.auth.access import LOGIN, LOGOUT, Access, bearer_key
from ngd_service.errors import UnauthorizedError

__all__ = ["AuthenticatedOnly", "login_path"]

log = logging.getLogger(__name__)

# Probes and Prometheus hold no key; their answers name no job but for the ids of running ones.
OPEN_TO_ALL = frozenset(
    {(method, path) for method in ("GET", "HEAD") for path in ("/healthz", "/readyz", "/metrics", "/openapi.json")}
    | {("GET", LOGIN), ("POST", LOGIN), ("POST", LOGOUT)}
)
WITH_A_KEY = "send it as Authorization: Bearer <key>; with ngd, give --key-file or set NGD_API_KEY_FILE"


class AuthenticatedOnly:
    """Rejects unauthenticated requests on every path not listed in OPEN_TO_ALL; names the caller in `state.key_owner`.

    A browser that asks for a page is sent to the login page instead.
    """

    def __init__(self, app: ASGIApp, *, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._access.is_open or _is_open(scope):
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        key_owner = self._access.key_owner(headers.get("authorization"), headers.get("cookie"))
        if key_owner is not None:
            return await self._let_in(key_owner, scope, receive, send)
        if scope["type"] == "websocket":
            return await WebSocketClose(1008, "log in first")(scope, receive, send)
        has_key = bearer_key(headers.get("authorization")) is not None
        if not has_key and scope["method"] == "GET" and _is_page(scope["path"]):
            query = scope["query_string"].decode("latin-1")
            wanted = scope["path"] + (f"?{query}" if query else "")
            return await RedirectResponse(login_path(wanted), 303)(scope, receive, send)
        refusal = UnauthorizedError(_why(headers, has_key=has_key))
        return await answer(Request(scope), refusal)(scope, receive, send)

    async def _let_in(self, key_owner: str, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["key_owner"] = key_owner
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD"):
            log.info("change holder=%s method=%s path=%r", key_owner, scope["method"], scope["path"])
        await self._app(scope, receive, send)


def login_path(wanted: str) -> str:
    """Returns where to log in; `wanted` is the page to go to then."""
    return LOGIN if wanted == "/" else f"{LOGIN}?next={quote(wanted, safe='')}"


def _is_open(scope: Scope) -> bool:
    path: str = scope["path"]
    return (scope.get("method"), path) in OPEN_TO_ALL or path.startswith(f"{INTERNAL_PREFIX}/")


def _is_page(path: str) -> bool:
    return not path.startswith(("/api/", "/_nicegui"))


def _why(headers: Headers, *, has_key: bool) -> str:
    if has_key:
        return f"the API key is none of this service's, or no longer; ask who runs it for one, and {WITH_A_KEY}"
    if "cookie" in headers:
        return f"the session has ended; log in again, or have an API key and {WITH_A_KEY}"
    return f"this service wants an API key; {WITH_A_KEY}"
