"""/jobs/{id}/checkpoints: those that a job has saved, and their files."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated

from fastapi import APIRouter, Path
from fastapi.responses import FileResponse

from ngd_service.api.container import MAX_CURSOR, Container, ContainerDep, JobId
from ngd_service.errors import NotFoundError, StorageUnavailableError
from ngd_service.resources import Checkpoint, CheckpointFile, CheckpointList
from ngd_workers.contract.checkpoint_files import PINNED, Manifest, best_of, complete, folder_of, read_manifest

__all__ = ["router"]

Step = Annotated[int, Path(ge=0, le=MAX_CURSOR, description="The checkpoint's step.")]
router = APIRouter(prefix="/api/v1/jobs/{job_id}/checkpoints", tags=["checkpoints"])


@router.get("")
async def list_checkpoints(container: ContainerDep, job_id: JobId) -> CheckpointList:
    """Lists the checkpoints that a job keeps, newest first: the last ones, the best by its first metric, and those
    that are pinned."""
    await asyncio.to_thread(container.jobs.get, job_id)
    return CheckpointList(checkpoints=await asyncio.to_thread(_listed, container, job_id))


@router.get("/{step}/files/{name}", response_class=FileResponse)
async def get_checkpoint_file(
    container: ContainerDep,
    job_id: JobId,
    step: Step,
    name: Annotated[str, Path(description="One of the checkpoint's files.", examples=["weights.safetensors"])],
) -> FileResponse:
    """Returns one file of a checkpoint, or the bytes of a Range of it."""
    checkpoint = await asyncio.to_thread(_kept, container, job_id, step)
    if name not in checkpoint.files:
        raise NotFoundError(f"the checkpoint has no file {name!r}; it has {', '.join(checkpoint.files)}")
    path = folder_of(container.files.checkpoints(job_id), step) / name
    etag = f'"{checkpoint.files[name].sha256}"'
    return FileResponse(path, media_type="application/octet-stream", filename=name, headers={"ETag": etag})


@router.put("/{step}/pin")
def pin_checkpoint(container: ContainerDep, job_id: JobId, step: Step) -> Checkpoint:
    """Keeps the checkpoint for as long as it is pinned, however many come after it; a second time changes nothing."""
    _kept(container, job_id, step)
    with _storage(job_id, "pin a checkpoint"), suppress(FileNotFoundError):  # gone since then: the answer says so
        (folder_of(container.files.checkpoints(job_id), step) / PINNED).touch()
    return _kept(container, job_id, step)


@router.delete("/{step}/pin")
def unpin_checkpoint(container: ContainerDep, job_id: JobId, step: Step) -> Checkpoint:
    """Lets the checkpoint go when newer ones come; the next one that the job saves may remove it."""
    _kept(container, job_id, step)
    with _storage(job_id, "unpin a checkpoint"):
        (folder_of(container.files.checkpoints(job_id), step) / PINNED).unlink(missing_ok=True)
    return _kept(container, job_id, step)


def _kept(container: Container, job_id: str, step: int) -> Checkpoint:
    """Returns the job's checkpoint of this step. Raises: NotFoundError, StorageUnavailableError."""
    container.jobs.get(job_id)
    listed = _listed(container, job_id)
    checkpoint = next((one for one in listed if one.step == step), None)
    if checkpoint is None:
        steps = ", ".join(str(one.step) for one in listed) or "none"
        raise NotFoundError(f"{job_id} keeps no checkpoint of step {step}; it keeps those of: {steps}")
    return checkpoint


@contextmanager
def _storage(job_id: str, action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageUnavailableError(
            f"can't {action} of {job_id}: {error.strerror}; try again when the volume is there and may be written"
        ) from error


def _listed(container: Container, job_id: str) -> list[Checkpoint]:
    folder = container.files.checkpoints(job_id)
    with _storage(job_id, "read the checkpoints"):
        manifests = {path: read_manifest(path) for path in complete(folder)}
    best = best_of(manifests)
    return [
        _resource(manifest, is_best=path == best, is_pinned=(path / PINNED).exists())
        for path, manifest in manifests.items()
        if manifest is not None  # else it is damaged, and no attempt resumes from it
    ]


def _resource(manifest: Manifest, *, is_best: bool, is_pinned: bool) -> Checkpoint:
    return Checkpoint(
        step=manifest.step,
        attempt=manifest.attempt,
        world_size=manifest.world_size,
        bytes=manifest.bytes,
        metrics={} if manifest.score is None else manifest.score.metrics,
        is_best=is_best,
        is_pinned=is_pinned,
        model=None if manifest.model is None else manifest.model.model_dump(),
        files={name: CheckpointFile(bytes=found.bytes, sha256=found.sha256) for name, found in manifest.files.items()},
    )
