"""Secrets of one installation: a key in its home, and what is derived from it, so that nothing has to be stored."""

import base64
import binascii
import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path

from ngd_service.errors import PageTokenError, StartupError

__all__ = ["Tokens", "read_key", "read_or_create_key"]

KEY_BYTES = 32
HEX_KEY = re.compile(rb"[0-9a-fA-F]{%d}\s*" % (2 * KEY_BYTES))
SIGNATURE_BYTES = 16


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

    @property
    def installation_id(self) -> str:
        """Tells this installation from any other, without giving the key away."""
        return self._sign("installation").hex()

    def of_attempt(self, attempt_id: str) -> str:
        """Returns the attempt's bearer token: the same after a restart, another for each attempt."""
        return self._sign("attempt", attempt_id).hex()

    def is_of_attempt(self, attempt_id: str, token: str) -> bool:
        return hmac.compare_digest(self.of_attempt(attempt_id).encode(), token.encode())

    def of_session(self, holder: str, expires_s: int, key_digest: bytes) -> str:
        """Returns what proves that a session is `holder`'s; it is another once the holder's API key has changed."""
        return self._sign("session", holder, str(expires_s), key_digest.hex()).hex()

    def page(self, before_id: str, query: str) -> str:
        """Returns the token of the page that begins before `before_id`, good for the same `query` alone."""
        return base64.urlsafe_b64encode(
            self._sign("page", query, before_id)[:SIGNATURE_BYTES] + before_id.encode()
        ).decode()

    def before_id(self, page_token: str, query: str) -> str:
        """Returns where the page begins. Raises: PageTokenError."""
        try:
            raw = base64.urlsafe_b64decode(page_token.encode())
            before_id = raw[SIGNATURE_BYTES:].decode()
        except (binascii.Error, UnicodeError) as error:
            raise PageTokenError(f"page_token {page_token!r} is not one of this service's") from error
        if not hmac.compare_digest(raw[:SIGNATURE_BYTES], self._sign("page", query, before_id)[:SIGNATURE_BYTES]):
            raise PageTokenError("page_token belongs to a list with other filters; start again without it")
        return before_id

    def _sign(self, *parts: str) -> bytes:
        return hmac.digest(self._key, "\0".join(parts).encode(), hashlib.sha256)
