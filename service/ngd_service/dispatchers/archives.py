"""The archives of users' code, each under its SHA-256, on the volume of runs: the workers see the same paths."""

import asyncio
import errno
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

from ngd_service.errors import (
    ArchiveDiffersError,
    InvalidSpecError,
    StorageFullError,
    StorageUnavailableError,
)
from ngd_service.resources import ProblemItem
from ngd_workers.contract.spec import AnySpec

__all__ = ["Archives"]

log = logging.getLogger(__name__)

FOLDER = ".code"
UNFINISHED = ".new-"
ABANDONED_S = 24 * 3600.0
PIECE_BYTES = 1 << 20  # written at once, in a thread: the event loop answers others meanwhile
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class Archives:
    """Keeps what clients ship below runs_dir. Archives are never changed: the same name is the same content."""

    def __init__(self, runs_dir: Path) -> None:
        self._folder = runs_dir / FOLDER

    def path(self, sha256: str) -> Path:
        return self._folder / f"{sha256}.tar.gz"

    def holds(self, sha256: str) -> bool:
        """Returns whether the archive is here. Raises: StorageUnavailableError."""
        try:
            return self.path(sha256).is_file()
        except OSError as error:
            raise self._unavailable(error) from error

    def check(self, spec: AnySpec) -> None:
        """Raises: InvalidSpecError if the spec names code that is not here; StorageUnavailableError."""
        if spec.code is None:
            return
        if spec.code.sha256 is None:
            detail = "code.sha256 is missing: the folder was not shipped"
        elif not self.holds(spec.code.sha256):
            detail = f"code.sha256 must name an archive that was shipped, got {spec.code.sha256}"
        else:
            return
        hint = "ngd submit ships the folder; other clients first send it by PUT /api/v1/code/{sha256}"
        raise InvalidSpecError(
            detail, [ProblemItem(pointer="/code/sha256", code="not_shipped", detail=detail, hint=hint)]
        )

    async def take(self, sha256: str, pieces: AsyncIterator[bytes]) -> None:
        """Stores the archive once all of it has come.

        Raises: ArchiveDiffersError, StorageFullError, StorageUnavailableError; then nothing is kept.
        """
        temporary: Path | None = None
        try:
            handle, name = await asyncio.to_thread(self._begin)
            temporary = Path(name)
            with os.fdopen(handle, "wb") as file:
                digest = hashlib.sha256()
                async for piece in _gathered(pieces):
                    digest.update(piece)
                    await asyncio.to_thread(file.write, piece)
                if digest.hexdigest() != sha256:
                    raise ArchiveDiffersError(
                        f"the body's SHA-256 is {digest.hexdigest()}, and the address names {sha256}; send the archive "
                        "whole, to the address of its own sum"
                    )
                await asyncio.to_thread(_to_disk, file)
            await asyncio.to_thread(temporary.replace, self.path(sha256))
        except OSError as error:
            raise self._unavailable(error) from error
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)

    def _begin(self) -> tuple[int, str]:
        self._folder.mkdir(exist_ok=True)
        for path in self._folder.glob(f"{UNFINISHED}*"):
            if time.time() - path.stat().st_mtime > ABANDONED_S:  # of a controller that was killed
                path.unlink(missing_ok=True)
        return tempfile.mkstemp(dir=self._folder, prefix=UNFINISHED)

    def _unavailable(self, error: OSError) -> StorageFullError | StorageUnavailableError:
        log.warning("code_not_stored path=%s error=%s", self._folder, error)
        if error.errno in FULL:
            return StorageFullError("the service's disk is full, so the code was not stored; ask who runs it for room")
        return StorageUnavailableError(
            f"the service can't use its folder of code ({error.strerror or error}); try again, or ask who runs it"
        )


async def _gathered(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yields the same bytes in pieces that are worth a thread. The app's BodyLimit bounds them."""
    waiting = bytearray()
    async for piece in pieces:
        waiting += piece
        if len(waiting) >= PIECE_BYTES:
            yield bytes(waiting)
            waiting.clear()
    yield bytes(waiting)


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
