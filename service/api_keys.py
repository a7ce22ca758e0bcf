"""The API keys: one file each, named for who holds it; read again when the folder changes."""

import hashlib
import hmac
import logging
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from service.errors import StartupError

__all__ = ["ApiKeys"]

log = logging.getLogger(__name__)

MIN_CHARACTERS, MAX_CHARACTERS = 20, 1024
REREAD_S = 1.0
HOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
KEY = re.compile(rb"[!-~]+")  # what a header carries as it is: visible ASCII
HOW = "make one with: openssl rand -hex 32"


class ApiKeys:
    """Who may call. A change of the folder counts within a second; one that is wrong is logged, and the old keys stay.

    Keys are long and random, so a plain SHA-256 of each is all that is kept of them. Safe to share between threads.
    """

    def __init__(self, folder: Path) -> None:
        """Raises: StartupError with one sentence if the folder is not one of good keys."""
        self._folder = folder
        self._digests = _read(folder)
        self._trouble = ""
        self._read_at = time.monotonic()
        self._reading = threading.Lock()

    def holder_of(self, key: str) -> str | None:
        """Returns who holds the key; None: nobody. Takes as long for a wrong key as for a right one."""
        given, found = _digest(key.encode()), None
        for holder, digest in self._current().items():
            if hmac.compare_digest(given, digest):
                found = holder
        return found

    def digest_of(self, holder: str) -> bytes | None:
        """Returns a digest of the holder's key; None: there is no such holder, or no longer."""
        return self._current().get(holder)

    def _current(self) -> Mapping[str, bytes]:
        with self._reading:
            if time.monotonic() - self._read_at >= REREAD_S:
                self._reread()
                self._read_at = time.monotonic()
            return self._digests

    def _reread(self) -> None:
        try:
            digests, trouble = _read(self._folder), ""
        except StartupError as error:
            digests, trouble = self._digests, str(error)
        if trouble and trouble != self._trouble:
            log.error("api_keys_kept holders=%s error=%s", ",".join(self._digests), trouble)
        if digests != self._digests:
            log.info("api_keys_read holders=%s", ",".join(digests))
        self._digests, self._trouble = digests, trouble


def _read(folder: Path) -> dict[str, bytes]:
    """Returns holder -> digest of key. What begins with "." is skipped: Kubernetes keeps a volume's versions so."""
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        keys = {_holder(path): _key(path) for path in paths}
    except OSError as error:
        where = error.filename or folder
        raise StartupError(f"can't read the API keys in {where}: {error.strerror}; check NGD_API_KEYS_DIR") from error
    if not keys:
        raise StartupError(
            f"there is no API key in {folder} (NGD_API_KEYS_DIR); put a file there for each who may call, {HOW}"
        )
    digests = {holder: _digest(key) for holder, key in keys.items()}
    if len(set(digests.values())) < len(digests):
        same = [holder for holder, digest in digests.items() if list(digests.values()).count(digest) > 1]
        raise StartupError(f"{' and '.join(same)} have the same API key in {folder}; give each a key of their own")
    return digests


def _holder(path: Path) -> str:
    if not HOLDER.fullmatch(path.name):
        raise StartupError(
            f"the name of an API key's file must be 1 to 63 letters, digits, '.', '_' or '-', got {path.name!r} in "
            f"{path.parent} (NGD_API_KEYS_DIR); rename it"
        )
    return path.name


def _key(path: Path) -> bytes:
    key = path.read_bytes()[: MAX_CHARACTERS + 2].strip()
    if not MIN_CHARACTERS <= len(key) <= MAX_CHARACTERS:
        size = len(key) if len(key) <= MAX_CHARACTERS else f"more than {MAX_CHARACTERS}"
        raise StartupError(
            f"the API key in {path} must have {MIN_CHARACTERS} to {MAX_CHARACTERS} characters, got {size}; {HOW}"
        )
    if not KEY.fullmatch(key):
        raise StartupError(f"the API key in {path} must be visible ASCII characters without spaces; {HOW}")
    return key


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
