"""Checkpoints of a job on disk: complete or absent, verified before use, fenced between attempts.

A checkpoint is a folder `step-<8 digits>` with state.pt and manifest.json. An attempt writes it
under a temporary name and renames it when all of it is on disk, so a crash leaves it complete or as a skipped leftover.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from ngd_workers.contract.errors import StorageError, SupersededError
from ngd_workers.contract.rundir import AttemptDir, read_json, write_json

__all__ = ["Checkpoints", "Manifest"]

log = logging.getLogger(__name__)

STATE = "state.pt"
MANIFEST = "manifest.json"


class Manifest(BaseModel):
    """The origin of a checkpoint, and the size and hash that show whether it is whole."""

    model_config = ConfigDict(frozen=True)

    step: int
    attempt: int
    world_size: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The folder with a job's checkpoints, as one attempt uses it."""

    folder: Path
    attempt: int
    keep: int

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, state: dict[str, Any], *, world_size: int) -> Manifest:
        """Returns the manifest of the checkpoint, which is complete on disk.

        Raises: SupersededError; StorageError, which leaves the older checkpoints as they were.
        """
        unfinished = self.folder / f"step-{step:08d}.tmp-a{self.attempt}"
        with _storage_errors(f"write the checkpoint of step {step} below {self.folder}"):
            self._refuse_if_superseded()
            try:
                manifest = self._write(unfinished, step, state, world_size)
                self._refuse_if_superseded()  # again: writing takes a while
                for path in self._complete():
                    if _step(path) >= step:  # damaged: otherwise the run would have resumed from it
                        shutil.rmtree(path)
                unfinished.rename(self.path(step))
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)  # on a full disk it would block the next ones too
                raise
            _sync_folder(self.folder)
            self._prune()
        return manifest

    def newest_step(self) -> int:
        """Returns the step of the newest checkpoint that is whole, 0 if there is none.

        Raises: StorageError if one can't be read now: a run that resumes from an older one would lose steps.
        """
        with _storage_errors(f"read the checkpoints below {self.folder}"):
            for path in self._complete():
                problem = _damage(path)
                if problem is None:
                    return _step(path)
                log.warning("checkpoint %s is skipped: %s", path.name, problem)
            return 0

    def load(self, step: int, device: torch.device) -> dict[str, Any]:
        """Returns the state of the checkpoint of `step`, with tensors on the device. Raises: StorageError."""
        with _storage_errors(f"read the checkpoint of step {step} below {self.folder}"):
            state: dict[str, Any] = torch.load(self.path(step) / STATE, map_location=device, weights_only=True)
            return state

    def _write(self, folder: Path, step: int, state: dict[str, Any], world_size: int) -> Manifest:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with (folder / STATE).open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        size, digest = _measure(folder / STATE)
        manifest = Manifest(step=step, attempt=self.attempt, world_size=world_size, bytes=size, sha256=digest)
        write_json(folder / MANIFEST, manifest)
        return manifest

    def _complete(self) -> list[Path]:
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        steps = [self.folder / name for name in names if name.startswith("step-") and ".tmp-" not in name]
        return sorted(steps, key=_step, reverse=True)

    def _refuse_if_superseded(self) -> None:
        if AttemptDir.of(self.folder.parent, self.attempt).ended.exists():
            raise SupersededError(f"attempt {self.attempt} may not write: the service has ended it")
        for path in self._complete():
            manifest = _manifest(path)
            if manifest is not None and manifest.attempt > self.attempt:
                raise SupersededError(
                    f"attempt {self.attempt} may not write: attempt {manifest.attempt} has written {path.name}"
                )

    def _prune(self) -> None:
        for path in self._complete()[self.keep :]:
            shutil.rmtree(path)
        for path in self.folder.glob("step-*.tmp-a*"):
            if int(path.name.rpartition("-a")[2]) <= self.attempt:
                shutil.rmtree(path)


@contextmanager
def _storage_errors(action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"can't {action}: {error.strerror or error}; free some space or check the volume") from error
    except RuntimeError as error:
        if "inline_container" not in str(error):  # torch's archive: its file could not be written or read
            raise
        raise StorageError(f"can't {action}: {str(error).splitlines()[0]}; check the volume") from error


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _manifest(path: Path) -> Manifest | None:
    try:
        return read_json(path / MANIFEST, Manifest)
    except ValidationError:
        return None


def _damage(path: Path) -> str | None:
    manifest = _manifest(path)
    if manifest is None:
        return f"no readable {MANIFEST}"
    try:
        size, digest = _measure(path / STATE)
    except FileNotFoundError:
        return f"no {STATE}"
    if (size, digest) != (manifest.bytes, manifest.sha256):
        wanted = f"{manifest.bytes} bytes with sha256 {manifest.sha256[:12]}"
        return f"{STATE} must be {wanted}, got {size} bytes with {digest[:12]}"
    return None


def _measure(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return path.stat().st_size, digest


def _sync_folder(folder: Path) -> None:
    # The rename itself is on disk only after the folder is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
