"""Checkpoints of a job on disk: complete or absent, verified before use, fenced between attempts.

An attempt writes the files under a temporary name of the folder, each rank its own, and renames the folder when all of
it is on disk, so a crash leaves it complete or as a skipped leftover.
"""

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ngd_workers.contract.checkpoint_files import (
    MANIFEST,
    PINNED,
    WEIGHTS,
    FileSum,
    Manifest,
    ModelFacts,
    Score,
    best_of,
    complete,
    folder_of,
    read_manifest,
    state_file,
    step_of,
)
from ngd_workers.contract.errors import StorageError, SupersededError
from ngd_workers.contract.rundir import AttemptDir, read_json, write_json

__all__ = ["Checkpoints", "Snapshot"]

log = logging.getLogger(__name__)

LOOK_S = 0.05  # between two looks for the files of other ranks


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The part of a checkpoint that one rank writes, in tensors that training does not touch any more.

    weights: of the model, on rank 0; None: of an own loop, which has all in its state. state: None on a rank that has
    nothing of its own. num_ranks: those that write a file; they are the first ones. score, model: on rank 0.
    """

    weights: Mapping[str, Tensor] | None
    state: Any
    num_ranks: int = 1
    score: Score | None = None
    model: ModelFacts | None = None


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The folder with a job's checkpoints, as one attempt uses it."""

    folder: Path
    attempt: int
    keep: int

    def path(self, step: int) -> Path:
        return folder_of(self.folder, step)

    def unfinished(self, step: int) -> Path:
        """Returns the folder in which this attempt writes the checkpoint."""
        return self.path(step).with_name(f"{self.path(step).name}.tmp-a{self.attempt}")

    def begin(self, step: int) -> None:
        """Makes the folder that all ranks write into; rank 0 calls it before. Raises: SupersededError, StorageError."""
        with self._writes(step):
            self._refuse_if_superseded()
            shutil.rmtree(self.unfinished(step), ignore_errors=True)
            self.unfinished(step).mkdir(parents=True)

    def write(self, step: int, rank: int, snapshot: Snapshot) -> None:
        """Writes the files of one rank, and their sums beside them, which tell rank 0. Raises: StorageError."""
        folder, name = self.unfinished(step), state_file(rank)
        try:
            with self._writes(step):
                if snapshot.weights is not None:
                    _save_weights(folder / WEIGHTS, snapshot.weights)
                _save(folder / name, snapshot.state)
                write_json(_sum_file(folder / name), _measure(folder / name))
        except StorageError as error:
            (folder / name).unlink(missing_ok=True)  # on a full disk it makes room for the word to rank 0
            with suppress(OSError):
                write_json(_sum_file(folder / name), FileSum(error=str(error)))
            raise

    def commit(self, step: int, snapshot: Snapshot, *, world_size: int, gives_up: Callable[[], bool]) -> Manifest:
        """Returns the manifest of the checkpoint, which is complete on disk once all ranks have written their files.

        Rank 0 calls it after its own `write`. gives_up: whether to wait for the other ranks no longer.
        Raises: SupersededError; StorageError, which leaves the older checkpoints as they were.
        """
        folder = self.unfinished(step)
        with self._writes(step):
            files = {} if snapshot.weights is None else {WEIGHTS: _measure(folder / WEIGHTS)}
            files |= {state_file(r): _sum_of(folder, r, gives_up) for r in range(snapshot.num_ranks)}
            manifest = Manifest(
                step=step,
                attempt=self.attempt,
                world_size=world_size,
                files=files,
                score=snapshot.score,
                model=snapshot.model,
            )
            write_json(folder / MANIFEST, manifest)
            for name in files:
                _sum_file(folder / name).unlink(missing_ok=True)
            self._refuse_if_superseded()  # again: writing takes a while
            for path in complete(self.folder):
                if step_of(path) >= step:  # damaged: otherwise the run would have resumed from it
                    shutil.rmtree(path)
            folder.rename(self.path(step))
            _sync_folder(self.folder)
            self._prune()
        return manifest

    def abandon(self, step: int) -> None:
        """Removes what was written of a checkpoint; on a full disk it would block the next ones too."""
        shutil.rmtree(self.unfinished(step), ignore_errors=True)

    def save(self, step: int, snapshot: Snapshot, *, world_size: int = 1) -> Manifest:
        """Returns the manifest of a checkpoint of which this rank writes everything.

        Raises: SupersededError; StorageError, which leaves the older checkpoints as they were.
        """
        self.begin(step)
        try:
            self.write(step, 0, snapshot)
            return self.commit(step, snapshot, world_size=world_size, gives_up=lambda: True)
        except BaseException:
            self.abandon(step)
            raise

    def newest_step(self) -> int:
        """Returns the step of the newest checkpoint that is whole, 0 if there is none.

        Raises: StorageError if one can't be read now: a run that resumes from an older one would lose steps.
        """
        with _storage_errors(f"read the checkpoints below {self.folder}"):
            for path in complete(self.folder):
                problem = _damage(path)
                if problem is None:
                    return step_of(path)
                log.warning("checkpoint %s is skipped: %s", path.name, problem)
            return 0

    def load(self, step: int, device: torch.device) -> tuple[dict[str, Tensor] | None, list[Any]]:
        """Returns the weights, and the states of all ranks that wrote one, with tensors on the device.

        Raises: StorageError.
        """
        folder = self.path(step)
        with _storage_errors(f"read the checkpoint of step {step} below {self.folder}"):
            manifest = read_manifest(folder)
            names = [] if manifest is None else list(manifest.files)
            states = [_load(folder / name, device) for name in names if name != WEIGHTS]
            return load_file(folder / WEIGHTS, device=str(device)) if WEIGHTS in names else None, states

    @contextmanager
    def _writes(self, step: int) -> Iterator[None]:
        with _storage_errors(f"write the checkpoint of step {step} below {self.folder}"):
            yield

    def _refuse_if_superseded(self) -> None:
        if AttemptDir.of(self.folder.parent, self.attempt).ended.exists():
            raise SupersededError(f"attempt {self.attempt} may not write: the service has ended it")
        for path in complete(self.folder):
            manifest = read_manifest(path)
            if manifest is not None and manifest.attempt > self.attempt:
                raise SupersededError(
                    f"attempt {self.attempt} may not write: attempt {manifest.attempt} has written {path.name}"
                )

    def _prune(self) -> None:
        """Removes all but the newest checkpoints, the best one and those that are pinned."""
        found = complete(self.folder)
        best = best_of({path: read_manifest(path) for path in found})
        for path in found[self.keep :]:
            if path != best:
                path.rename(self.unfinished(step_of(path)))
        for path in self.folder.glob("step-*.tmp-a*"):
            if (path / PINNED).exists():  # looked at after the rename: from then on the service can't pin it
                path.rename(self.folder / path.name.partition(".")[0])
            elif int(path.name.rpartition("-a")[2]) <= self.attempt:
                shutil.rmtree(path)


@contextmanager
def _storage_errors(action: str) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"can't {action}: {error.strerror or error}; free some space or check the volume") from error
    except SafetensorError as error:
        raise StorageError(f"can't {action}: {WEIGHTS}: {error}; free some space or check the volume") from error
    except RuntimeError as error:
        if "inline_container" not in str(error):  # torch's archive: its file could not be written or read
            raise
        raise StorageError(f"can't {action}: {str(error).splitlines()[0]}; check the volume") from error


def _sum_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sum")


def _sum_of(folder: Path, rank: int, gives_up: Callable[[], bool]) -> FileSum:
    """Returns the sum of a rank's file once that rank has written it."""
    path = _sum_file(folder / state_file(rank))
    while (found := read_json(path, FileSum)) is None:
        if gives_up():
            raise StorageError(f"can't write the checkpoint below {folder}: rank {rank} has not written its part")
        time.sleep(LOOK_S)
    if found.error is not None:
        raise StorageError(found.error)
    return found


def _save(path: Path, value: Any) -> None:
    with path.open("wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())


def _save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    path.touch()  # the library's own errors name no file
    save_file(dict(weights), path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _load(path: Path, device: torch.device) -> Any:
    return torch.load(path, map_location=device, weights_only=True)


def _damage(path: Path) -> str | None:
    manifest = read_manifest(path)
    if manifest is None:
        return f"no readable {MANIFEST}"
    for name, wanted in manifest.files.items():
        try:
            found = _measure(path / name)
        except FileNotFoundError:
            return f"no {name}"
        if found != wanted:
            return (
                f"{name} must be {wanted.bytes} bytes with sha256 {wanted.sha256[:12]}, got {found.bytes} bytes with "
                f"{found.sha256[:12]}"
            )
    return None


def _measure(path: Path) -> FileSum:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileSum(bytes=path.stat().st_size, sha256=digest)


def _sync_folder(folder: Path) -> None:
    # The rename itself is on disk only after the folder is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
