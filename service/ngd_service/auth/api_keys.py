"""The API keys: one file each, named after its owner; read again when the folder changes."""

import hashlib
import hmac
import logging
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from ngd_service.errors import StartupError

__all__ = ["ApiKeys"]

log = logging.getLogger(__name__)

MIN_CHARACTERS, MAX_CHARACTERS = 20, 1024
REREAD_S = 1.0
HOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
KEY = re.compile(rb"[!-~]+")  # visible ASCII, which a header carries unchanged
HOW = "make one with: openssl rand -hex 32"


class ApiKeys:
    """Who may call. A change of the folder counts within a second.

    While something in it is wrong, which is logged, those whose file is as it was stay, and nobody is added: a key that
    was withdrawn is refused whatever else is in the folder. A folder that can't be read keeps the old keys.

    Keys are long and random, so a plain SHA-256 of each is all that is kept of them. Safe to share between threads.
    """

    def __init__(self, folder: Path) -> None:
        """Raises: StartupError with one sentence if the folder is not one of good keys."""
        self._folder = folder
        try:
            self._digests, self._trouble = _read(folder)
        except OSError as error:
            raise StartupError(_unreadable(folder, error)) from error
        if self._trouble:
            raise StartupError(self._trouble)
        self._read_at = time.monotonic()
        self._reading = threading.Lock()

    def key_owner_of(self, key: str) -> str | None:
        """Returns the key's owner; None: an unknown key. Takes as long for a wrong key as for a right one."""
        given, match = _digest(key.encode()), None
        for key_owner, digest in self._current().items():
            if hmac.compare_digest(given, digest):
                match = key_owner
        return match

    def digest_of(self, key_owner: str) -> bytes | None:
        """Returns a digest of the owner's key; None: there is no such owner, or no longer."""
        return self._current().get(key_owner)

    def _current(self) -> Mapping[str, bytes]:
        with self._reading:
            if time.monotonic() - self._read_at >= REREAD_S:
                self._reread()
                self._read_at = time.monotonic()
            return self._digests

    def _reread(self) -> None:
        try:
            digests, trouble = _read(self._folder)
        except OSError as error:
            digests, trouble = self._digests, _unreadable(self._folder, error)
        if trouble:
            digests = {
                key_owner: digest for key_owner, digest in self._digests.items() if digests.get(key_owner) == digest
            }
        is_new = digests != self._digests
        if trouble and (is_new or trouble != self._trouble):
            dropped = sorted(self._digests.keys() - digests.keys())
            log.error("api_keys_wrong holders=%s dropped=%s error=%s", ",".join(digests), ",".join(dropped), trouble)
        elif is_new:
            log.info("api_keys_read holders=%s", ",".join(digests))
        self._digests, self._trouble = digests, trouble


def _read(folder: Path) -> tuple[dict[str, bytes], str]:
    """Returns owner -> digest of key, of the valid files, and the faults of the others ("": none).

    What begins with "." is skipped: Kubernetes keeps a volume's versions so. Raises: OSError, of the folder itself.
    """
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    digests: dict[str, bytes] = {}
    wrong = []
    for path in paths:
        try:
            digests[_key_owner(path)] = _digest(_key(path))
        except StartupError as error:
            wrong.append(str(error))
        except OSError as error:
            wrong.append(_unreadable(path, error))
    if not paths:
        wrong.append(
            f"there is no API key in {folder} (NGD_API_KEYS_DIR); put a file there for each who may call, {HOW}"
        )
    same = [key_owner for key_owner, digest in digests.items() if list(digests.values()).count(digest) > 1]
    if same:
        wrong.append(f"{' and '.join(same)} have the same API key in {folder}; give each a key of their own")
    return digests, "; ".join(wrong)


def _unreadable(path: Path, error: OSError) -> str:
    return f"can't read the API keys in {path}: {error.strerror}; check NGD_API_KEYS_DIR"


def _key_owner(path: Path) -> str:
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
