"""Keeps web pages of other sites away while there are no API keys: any site may make its reader's browser send here."""

import ipaddress
from urllib.parse import urlsplit

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from service.api.problems import answer
from service.errors import ForeignPageError

__all__ = ["LocalPagesOnly"]


class LocalPagesOnly:
    """Refuses requests that name this machine otherwise than as loopback, or that a page from elsewhere sends.

    The first stops DNS rebinding, the second cross-site requests, also those of a page that another port of this
    machine serves; programs send no Origin and pass.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        refusal = _refusal(headers.get("host", ""), headers.get("origin"))
        if refusal is None:
            return await self._app(scope, receive, send)
        if scope["type"] == "websocket":
            return await WebSocketClose(1008, refusal)(scope, receive, send)
        return await answer(Request(scope), ForeignPageError(refusal))(scope, receive, send)


def _refusal(host: str, origin: str | None) -> str | None:
    if not _is_loopback(f"//{host}"):
        return f"the service answers to loopback addresses alone, got Host {host!r}; call it as 127.0.0.1 or localhost"
    if origin is not None and origin.partition("://")[2].lower() != host.lower():
        return f"the service takes no requests from pages of other addresses than {host}, got Origin {origin!r}"
    return None


def _is_loopback(url: str) -> bool:
    try:
        name = urlsplit(url).hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
