"""Who is behind a request: the owner of an API key, by the key itself or by a browser's session."""

import time
from collections.abc import Callable

from starlette.requests import cookie_parser

from ngd_service.auth.api_keys import ApiKeys
from ngd_service.auth.tokens import Tokens

__all__ = ["LOGIN", "LOGOUT", "SESSION_COOKIE", "SESSION_S", "Access", "bearer_key"]

LOGIN, LOGOUT = "/login", "/logout"
SESSION_COOKIE = "ngd_session"
SESSION_S = 7 * 24 * 3600


class Access:
    """Identifies callers. keys: None if the service has none, and then everybody is let in.

    A session is a signed text in the browser and nothing on the server: every controller with the same signing key and
    the same API keys knows it, and it ends with its week or with its owner's key.
    """

    def __init__(self, keys: ApiKeys | None, tokens: Tokens, now_s: Callable[[], float] = time.time) -> None:
        self._keys = keys
        self._tokens = tokens
        self._now_s = now_s

    @property
    def is_open(self) -> bool:
        """Whether there are no keys."""
        return self._keys is None

    def key_owner(self, authorization: str | None, cookies: str | None) -> str | None:
        """Returns the sender of these headers; None: an unknown one. A Bearer header counts alone.

        One of another scheme is a proxy's own, which browsers send along.
        """
        if self._keys is None:
            return None
        key = bearer_key(authorization)
        if key is not None:
            return self._keys.key_owner_of(key)
        session = cookie_parser(cookies or "").get(SESSION_COOKIE)
        return None if session is None else self._tokens.key_owner_of(session, self._now_s(), self._keys.digest_of)

    def session(self, key: str) -> tuple[str, str] | None:
        """Returns the owner of the key and a new session for them; None: the key is nobody's."""
        key_owner = self._keys.key_owner_of(key) if self._keys else None
        digest = self._keys.digest_of(key_owner) if self._keys and key_owner else None
        if key_owner is None or digest is None:
            return None
        expires_s = int(self._now_s()) + SESSION_S
        return key_owner, self._tokens.session(key_owner, expires_s, digest)


def bearer_key(authorization: str | None) -> str | None:
    """Returns the key in an Authorization header; None: it is of another scheme, or there is none."""
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None
