"""The verbs `ngd checkpoints`, `ngd download` and `ngd export`: what a job has saved, and its files on this machine."""

import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from ngd_service.cli.terminal import harmless
from ngd_service.client.client import Client, ServiceError
from ngd_service.client.downloads import DownloadError, chosen, download
from ngd_service.resources import Checkpoint
from ngd_workers.contract.checkpoint_files import WEIGHTS

__all__ = ["ExportError", "Format", "checkpoint_table", "exported", "fetched"]


class Format(StrEnum):
    """The formats of `ngd export`."""

    SAFETENSORS = "safetensors"
    TORCHSCRIPT = "torchscript"
    ONNX = "onnx"


class ExportError(ServiceError):
    """The model can't be written in the format that was asked for."""


def checkpoint_table(checkpoints: list[Checkpoint]) -> Table:
    """Returns the checkpoints, newest first."""
    table = Table(box=None, pad_edge=False)
    table.add_column("step", justify="right")
    table.add_column("MB", justify="right")
    table.add_column("weights, MB", justify="right")
    table.add_column("tested")
    table.add_column("")
    for one in checkpoints:
        weights = one.files.get(WEIGHTS)
        table.add_row(
            f"{one.step:,}",
            f"{one.bytes / 1e6:,.1f}",
            "" if weights is None else f"{weights.bytes / 1e6:,.1f}",
            harmless("  ".join(f"{name} {value:.4g}" for name, value in one.metrics.items())),
            ", ".join(word for word, is_so in (("best", one.is_best), ("pinned", one.is_pinned)) if is_so),
        )
    return table


def fetched(
    client: Client,
    job_id: str,
    err: Console,
    *,
    step: int | None,
    best: bool,
    folder: Path | None,
    everything: bool,
) -> dict[str, Path]:
    """Returns the paths of the files that are now here: the weights and their card, or all files of the checkpoint.

    folder: None for <job>-step-<step>. Raises: DownloadError, ServiceError; typer.BadParameter for a step and the best.
    """
    if step is not None and best:
        raise typer.BadParameter("--step and --best name two checkpoints; give one")
    job = client.get(job_id)
    checkpoint = chosen(job, client.checkpoints(job_id), step=step, best=best)
    if not everything and WEIGHTS not in checkpoint.files:
        raise DownloadError(
            f"the checkpoints of {job.id} hold what its own loop gave them, not weights by themselves; add --all"
        )
    names = list(checkpoint.files) if everything else [WEIGHTS]
    target = folder or Path(f"{job.name}-step-{checkpoint.step}")
    with _progress(err) as show:
        return download(client, job, checkpoint, target, names, show)


def exported(client: Client, job_id: str, folder: Path, kind: str) -> Path:
    """Returns the path of the model in this format, made from what `fetched` left in the folder.

    The model is built in a process of its own, which has torch; the job's own code is got for it. Raises: ExportError.
    """
    code = client.get(job_id).spec.get("code")
    command = [sys.executable, "-m", "ngd_workers.launch.export", str(folder), "--format", kind]
    with tempfile.TemporaryDirectory() as place:
        if code:
            with tarfile.open(fileobj=io.BytesIO(client.code(code["sha256"]))) as archive:
                archive.extractall(place, filter="data")
            command += ["--code", place]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise ExportError((ended.stderr.strip().splitlines() or ["the export failed without a word"])[-1])
    return Path(ended.stdout.splitlines()[-1])


@contextmanager
def _progress(err: Console) -> Iterator[Callable[[str, int, int], None]]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), DownloadColumn())
    with Progress(*columns, TransferSpeedColumn(), console=err, disable=not err.is_terminal) as progress:
        tasks = {}

        def show(name: str, here: int, size: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=size)
            progress.update(tasks[name], completed=here)

        yield show
