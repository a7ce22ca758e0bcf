"""A checkpoint's files on the caller's disk: resumed where they broke off, checked, and with a card of their origin."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ngd_service.client.answers import ServiceError
from ngd_service.client.client import Client
from ngd_service.resources import Checkpoint, CheckpointFile, Job

__all__ = ["CARD", "DownloadError", "card_of", "chosen", "download"]

CARD = "card.json"
PIECE_BYTES = 1 << 20

Show = Callable[[str, int, int], None]  # a file's name, the bytes that are here, all of its bytes


class DownloadError(ServiceError):
    """There is no such checkpoint, or a file can't be written, or it is not the one that was saved."""


def chosen(job: Job, checkpoints: list[Checkpoint], *, step: int | None = None, best: bool = False) -> Checkpoint:
    """Returns the checkpoint of the step, the best one, or the newest. Raises: DownloadError."""
    if not checkpoints:
        raise DownloadError(f"{job.id} has saved no checkpoint; it is {job.status.phase}")
    if best:
        found = next((one for one in checkpoints if one.is_best), None)
        if found is None:
            raise DownloadError(f"no checkpoint of {job.id} was tested at its step, so none is the best; give --step")
        return found
    found = checkpoints[0] if step is None else next((one for one in checkpoints if one.step == step), None)
    if found is None:
        steps = ", ".join(str(one.step) for one in checkpoints)
        raise DownloadError(f"{job.id} keeps no checkpoint of step {step}; it keeps those of: {steps}")
    return found


def card_of(job: Job, checkpoint: Checkpoint, started: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the origin of the weights: the job's spec, versions, and the metrics of the step.

    started: the data of the attempt's event `started`, which has the versions.
    """
    return {
        "job": job.id,
        "name": job.name,
        "step": checkpoint.step,
        "metrics": checkpoint.metrics,
        "files": {name: file.model_dump() for name, file in checkpoint.files.items()},
        "spec": job.spec,
        "model": checkpoint.model,
        "code_sha256": (job.spec.get("code") or {}).get("sha256"),
        "versions": (started or {}).get("versions", {}),
        "commit": (started or {}).get("commit"),
        "parameters": (started or {}).get("parameters"),
        "world_size": checkpoint.world_size,
        "created_at": job.created_at.isoformat(),
    }


def download(
    client: Client, job: Job, checkpoint: Checkpoint, folder: Path, names: list[str], show: Show
) -> dict[str, Path]:
    """Returns the paths of these files and of card.json, written into the folder. Raises: DownloadError, ServiceError.

    A file that broke off goes on where it did; one that is whole is not fetched again.
    """
    started = client.events(job.id, limit=1, newest_of=["started"]).events
    card = card_of(job, checkpoint, started[0].data if started else None)
    paths = {name: folder / name for name in [*names, CARD]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            _fetch(client, job.id, checkpoint, name, paths[name], show)
        paths[CARD].write_text(json.dumps(card, indent=2) + "\n")
    except OSError as error:
        raise DownloadError(f"can't write into {folder}: {error.strerror}; give another --output") from error
    return paths


def _fetch(client: Client, job_id: str, checkpoint: Checkpoint, name: str, path: Path, show: Show) -> None:
    wanted = checkpoint.files[name]
    if _is(path, wanted):
        show(name, wanted.bytes, wanted.bytes)
        return
    # The hash is in the name: what is left of another checkpoint's file is not taken for a part of this one.
    part = path.with_name(f".{path.name}.{wanted.sha256[:12]}.part")
    here = part.stat().st_size if part.exists() else 0
    if here < wanted.bytes:
        with part.open("ab") as file:
            for piece in client.download_file(job_id, checkpoint.step, name, start=here):
                file.write(piece)
                here += len(piece)
                show(name, here, wanted.bytes)
    if not _is(part, wanted):
        part.unlink()
        raise DownloadError(
            f"{name} of step {checkpoint.step} is damaged: it must be {wanted.bytes} bytes with sha256 "
            f"{wanted.sha256[:12]}; get it again, or take another --step"
        )
    part.replace(path)


def _is(path: Path, wanted: CheckpointFile) -> bool:
    if not path.is_file() or path.stat().st_size != wanted.bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == wanted.sha256
