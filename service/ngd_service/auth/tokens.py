"""Secrets of one installation: a key in its home, and tokens derived from it, so that none has to be stored."""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from itsdangerous import BadData, BadSignature, URLSafeSerializer

from ngd_service.errors import PageTokenError, StartupError

__all__ = ["Tokens", "read_key", "read_or_create_key"]

KEY_BYTES = 32
HEX_KEY = re.compile(rb"[0-9a-fA-F]{%d}\s*" % (2 * KEY_BYTES))
SHA256: dict[str, Any] = {"key_derivation": "hmac", "digest_method": hashlib.sha256}


def read_or_create_key(path: Path) -> bytes:
    """Returns the installation's key; the first call writes it, mode 0600. Raises: StartupError, OSError."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        key = path.read_bytes()
    else:
        key = secrets.token_bytes(KEY_BYTES)
        with os.fdopen(handle, "wb") as file:
            file.write(key)
    if len(key) != KEY_BYTES:
        raise StartupError(
            f"{path} must hold {KEY_BYTES} bytes, got {len(key)}; put the right one back, or delete it and the database"
        )
    return key


def read_key(path: Path) -> bytes:
    """Returns a key that was given: 32 bytes, or 64 hex digits and a line end. Raises: StartupError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StartupError(
            f"can't read the signing key {path}: {error.strerror}; NGD_SIGNING_KEY_FILE names the file that holds it"
        ) from error
    if HEX_KEY.fullmatch(content):
        return bytes.fromhex(content.decode())
    if len(content) != KEY_BYTES:
        raise StartupError(
            f"the signing key {path} (NGD_SIGNING_KEY_FILE) must be {2 * KEY_BYTES} hex digits or {KEY_BYTES} bytes, "
            f"got {len(content)} bytes; make one with: openssl rand -hex {KEY_BYTES}"
        )
    return content


class Tokens:
    """Bearer tokens of attempts, signed page tokens, and the signatures of browsers' sessions."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._sessions = URLSafeSerializer(key, salt="session", signer_kwargs=SHA256)

    @property
    def installation_id(self) -> str:
        """Tells this installation from any other, without giving the key away."""
        return self._sign("installation").hex()

    def of_attempt(self, attempt_id: str) -> str:
        """Returns the attempt's bearer token: the same after a restart, another for each attempt."""
        return self._sign("attempt", attempt_id).hex()

    def is_of_attempt(self, attempt_id: str, token: str) -> bool:
        return hmac.compare_digest(self.of_attempt(attempt_id).encode(), token.encode())

    def session(self, key_owner: str, expires_s: int, key_digest: bytes) -> str:
        """Returns the signed text that proves a session to be `key_owner`'s while their API key has this digest."""
        return self._sessions.dumps([key_owner, expires_s, self._sign("session", key_digest.hex()).hex()])

    def key_owner_of(self, session: str, now_s: float, digest_of: Callable[[str], bytes | None]) -> str | None:
        """Returns the session's owner; None: it was not signed here, its time is over, or the API key has changed."""
        try:
            key_owner, expires_s, proof = self._sessions.loads(session)
        except BadData:
            return None
        digest = digest_of(key_owner)
        if digest is None or expires_s < now_s:
            return None
        return key_owner if hmac.compare_digest(self._sign("session", digest.hex()).hex(), proof) else None

    def page(self, cursor: Sequence[Any], query: str) -> str:
        """Returns the token of the page that begins after `cursor`, good for the same `query` alone."""
        return self._pages(query).dumps(cursor)

    def cursor(self, page_token: str, query: str) -> tuple[Any, str]:
        """Returns where the page begins. Raises: PageTokenError."""
        try:
            value, job_id = self._pages(query).loads(page_token)
        except BadSignature as error:
            if error.payload is None:
                raise PageTokenError(f"page_token {page_token!r} is not one of this service's") from error
            raise PageTokenError("page_token belongs to a list with other filters; start again without it") from error
        return value, job_id

    def _pages(self, query: str) -> URLSafeSerializer:
        return URLSafeSerializer(self._key, salt=f"page\0{query}", signer_kwargs=SHA256)

    def _sign(self, *fields: str) -> bytes:
        return hmac.digest(self._key, "\0".join(fields).encode(), hashlib.sha256)
