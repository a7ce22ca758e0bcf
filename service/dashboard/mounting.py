"""How the pages join the service's application."""

import httpx
from fastapi import FastAPI
from nicegui import app as pages
from nicegui import ui
from starlette.routing import Match, Mount
from starlette.types import Scope

from service.client import AsyncClient
from service.dashboard import job, jobs
from service.dashboard.theme import FAVICON
from service.settings import Settings

__all__ = ["mount"]


class PagesMount(Mount):
    """Everything but the API, so that an unknown API path gets the API's problem and no page."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope.get("path", "").startswith("/api/"):
            return Match.NONE, {}
        return super().matches(scope)


def mount(app: FastAPI, settings: Settings) -> None:
    """Serves the pages on `app`, after the routes it has; they call its API in process.

    NiceGUI keeps one application a process: the first `app` gets the pages, any other goes without.
    """
    if pages.config.has_run_config:
        return
    # A request whose handler fails is answered with the API's problem, as it would be over a socket.
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    api = AsyncClient(settings.url, transport=transport)
    jobs.register(api)
    job.register(api)
    ui.run_with(app, title="ngd-dist", favicon=FAVICON, dark=None, tailwind=False, show_welcome_message=False)
    app.router.routes[-1] = PagesMount("", app=pages)
