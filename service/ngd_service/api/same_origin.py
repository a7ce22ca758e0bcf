"""Keeps web pages of other sites away: any site may make its reader's browser send here, with the reader's cookie."""

import ipaddress
from urllib.parse import urlsplit

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from ngd_service.api.problems import answer
from ngd_service.errors import ForeignPageError

__all__ = ["SameOriginOnly"]


class SameOriginOnly:
    """Refuses requests from pages of other origins and, on a loopback address, requests that name another host.

    The Origin check stops cross-site requests, also from a page that another port of this machine serves; programs send
    no Origin and pass. The Host check stops DNS rebinding when only this machine can reach the service. Beyond loopback
    the API key stops it: a browser keeps a session under the host name that set it.
    """

    def __init__(self, app: ASGIApp, *, public_url: str, is_loopback: bool) -> None:
        """public_url: where people reach the service, "" if no proxy stands before it."""
        self._app = app
        self._public_url = public_url
        self._is_loopback = is_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        refusal = self._refusal(headers.get("host", "").lower(), headers.get("origin"))
        if refusal is None:
            return await self._app(scope, receive, send)
        if scope["type"] == "websocket":
            return await WebSocketClose(1008, refusal)(scope, receive, send)
        return await answer(Request(scope), ForeignPageError(refusal))(scope, receive, send)

    def _refusal(self, host: str, origin: str | None) -> str | None:
        public_host = self._public_url.partition("://")[2]
        if self._is_loopback and host != public_host and not _is_loopback(f"//{host}"):
            return (
                f"the service answers to loopback addresses alone, got Host {host!r}; call it as 127.0.0.1 or "
                "localhost, or give the name that a proxy serves it under with NGD_PUBLIC_URL"
            )
        if origin is None or origin.lower() == self._public_url or origin.partition("://")[2].lower() == host:
            return None
        return (
            f"the service takes no requests from pages of other addresses than {self._public_url or host}, got Origin "
            f"{origin!r}; behind a proxy, NGD_PUBLIC_URL must be the address that browsers show"
        )


def _is_loopback(url: str) -> bool:
    try:
        name = urlsplit(url).hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
