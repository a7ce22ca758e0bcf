"""Counts the requests and how long each kind takes, by route and never by path: ids would make a series each."""

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ngd_service.monitoring.metrics import ControllerMetrics

__all__ = ["CountRequests"]

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
NO_ROUTE = "none"  # refused before, or instead of, being given to a route


class CountRequests:
    """Tells the metrics of each answer. A socket of the dashboard is no request."""

    def __init__(self, app: ASGIApp, *, metrics: ControllerMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status, seconds = time.monotonic(), 500, 0.0

        async def send_noting(message: Message) -> None:
            nonlocal status, seconds
            if message["type"] == "http.response.start":
                status, seconds = message["status"], time.monotonic() - began
            await send(message)

        try:
            await self._app(scope, receive, send_noting)
        finally:
            method = scope["method"] if scope["method"] in METHODS else "other"
            waits = b"wait_for=" in scope.get("query_string", b"")
            self._metrics.answered(method, _route(scope), status, None if waits else seconds)


def _route(scope: Scope) -> str:
    path: str = getattr(scope.get("route"), "path", "") or NO_ROUTE
    return "/_nicegui" if path.startswith("/_nicegui") else path  # the dashboard's own files, with their version
