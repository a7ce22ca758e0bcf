"""How the pages join the service's application."""

import httpx
from fastapi import FastAPI, Request, Response
from fastapi.exception_handlers import http_exception_handler
from nicegui import app as pages
from nicegui import ui
from starlette.exceptions import HTTPException
from starlette.routing import Match, Mount
from starlette.types import Receive, Scope, Send

from ngd_service.auth.access import Access
from ngd_service.client.client import AsyncClient
from ngd_service.dashboard import compare, job, jobs, submit
from ngd_service.dashboard.login import login_routes
from ngd_service.dashboard.plain import missing_page
from ngd_service.dashboard.theme import FAVICON, empty, page_frame
from ngd_service.settings import Settings

__all__ = ["mount"]

PROOFS = ("cookie", "authorization")
SILENCE_S = 10.0  # a socket of which nothing is heard for 1.2 times as long counts as lost, at both ends


class PagesMount(Mount):
    """Everything but the API, so that an unknown API path gets the API's problem and no page."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope.get("path", "").startswith("/api/"):
            return Match.NONE, {}
        match, child_scope = super().matches(scope)
        return Match.PARTIAL if match is Match.FULL and _is_other_method(scope) else match, child_scope

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _is_other_method(scope):
            raise HTTPException(405, headers={"Allow": "GET"})
        await super().handle(scope, receive, send)


def _is_other_method(scope: Scope) -> bool:
    """Returns whether no page takes the request's method; NiceGUI's own paths take what its scripts send."""
    taken = ("GET", "HEAD", "POST") if scope.get("path", "").startswith("/_nicegui") else ("GET",)
    return scope["type"] == "http" and scope["method"] not in taken


class AsReader(httpx.AsyncBaseTransport):
    """Calls the API in process as the reader of a page, so that the page reads no more than they may."""

    def __init__(self, app: FastAPI, request: Request) -> None:
        # A request whose handler fails is answered with the API's problem, as it would be over a socket.
        self._inside = httpx.ASGITransport(app, raise_app_exceptions=False)
        self._proof = {name: request.headers[name] for name in PROOFS if name in request.headers}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        request.headers.update(self._proof)
        return await self._inside.handle_async_request(request)


def mount(app: FastAPI, settings: Settings, access: Access) -> None:
    """Serves the pages on `app`, after the routes it has; they call its API in process.

    NiceGUI keeps one application a process: the first `app` gets the pages, any other goes without.
    """
    if not access.is_open:
        app.include_router(login_routes(access, is_secure=settings.people_url.startswith("https:")))
    if pages.config.has_run_config:
        return

    def api_of(request: Request) -> AsyncClient:
        return AsyncClient(settings.url, transport=AsReader(app, request))

    jobs.register(api_of)
    job.register(api_of)
    compare.register(api_of)
    submit.register(api_of)
    pages.exception_handler(404)(_missing)
    pages.on_page_exception(_failed)
    ui.run_with(
        app,
        title="ngd-dist",
        favicon=FAVICON,
        dark=None,
        tailwind=False,
        show_welcome_message=False,
        reconnect_timeout=SILENCE_S,
    )
    app.router.routes[-1] = PagesMount("", app=pages)


async def _missing(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and request.url.path.startswith("/_nicegui"):
        return await http_exception_handler(request, error)
    return missing_page()


def _failed() -> None:
    """Fills the page when its function raised an error; NiceGUI logs it."""
    with page_frame("Error") as freshness:
        empty("error", "This page can't be shown", "The service made a mistake, which is in its log. Load it again.")
    freshness.failed()
