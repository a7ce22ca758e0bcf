"""The verbs of `ngd data`: shards made of images, and their index. The work is done by `ngd_workers.shards`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ngd_service.cli.terminal import harmless
from ngd_workers.contract.errors import DataNotFoundError, InvalidDataError
from ngd_workers.shards.index import INDEX_NAME, Index, index_shards, parse_index, write_index
from ngd_workers.shards.pack import pack as pack_images

__all__ = ["data"]

SAMPLES_PER_SHARD = 1000  # 110 MB of ImageNet's images; 1,282 shards

data = typer.Typer(help="Make shards of images, and index shards that exist.", no_args_is_help=True)
out = Console(markup=False, emoji=False, highlight=False)
err = Console(stderr=True, markup=False, emoji=False, highlight=False)

Show = Callable[[str, int, int], None]


@data.command()
def pack(
    folder: Annotated[Path, typer.Argument(help="Folder with <part>/<class>/<image>, or a zip file of one.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the shards; it must not exist yet.")],
    train: Annotated[str, typer.Option(help="Folder of the training images, in FOLDER.")] = "train",
    test: Annotated[str, typer.Option(help="Folder of the test images, in FOLDER.")] = "val",
    samples_per_shard: Annotated[
        int | None, typer.Option(min=1, help="Images in each shard.", show_default=str(SAMPLES_PER_SHARD))
    ] = None,
    shard_bytes: Annotated[
        int | None, typer.Option(min=1, help="Most bytes of a shard, instead of a number of images.")
    ] = None,
) -> None:
    """Pack a folder of images into tar shards with an index, for data of kind webdataset."""
    if samples_per_shard and shard_bytes:
        raise typer.BadParameter("--samples-per-shard and --shard-bytes exclude each other; give one of them")
    with _progress("images") as show:
        indices = pack_images(
            folder,
            output,
            [train, test],
            show,
            samples_per_shard=None if shard_bytes else samples_per_shard or SAMPLES_PER_SHARD,
            shard_bytes=shard_bytes,
        )
    for part, index in indices.items():
        _print(f"{output / part}: {_summary(index)}")


@data.command()
def index(
    shards: Annotated[Path, typer.Argument(help="Folder with the *.tar files of one part.")],
    classes: Annotated[
        Path | None,
        typer.Option(
            help="File with the name of each class, one a line, in the order of their numbers [default: those of the "
            "index that is there]."
        ),
    ] = None,
) -> None:
    """Write index.json beside WebDataset tars (<key>.jpg, <key>.cls), from one pass over their headers."""
    names = _lines(classes) if classes else _classes_of(shards / INDEX_NAME)
    with _progress("shards") as show:
        made = index_shards(shards, names, lambda done, all_of_them: show(shards.name, done, all_of_them))
    write_index(made, shards)
    _print(f"{shards / INDEX_NAME}: {_summary(made)}")


@contextmanager
def _progress(unit: str) -> Iterator[Show]:
    """Gives the function that shows how far each part is: on a terminal by bars, otherwise nothing is shown."""
    columns = (
        TextColumn("{task.description:<10}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f} " + unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
        tasks = {}

        def show(part: str, done: int, all_of_them: int) -> None:
            if part not in tasks:
                tasks[part] = progress.add_task(harmless(part), total=all_of_them)
            progress.update(tasks[part], completed=done)

        yield show


def _summary(index: Index) -> str:
    classes = len(index.classes) if index.classes else index.num_labels
    size = sum(shard.bytes for shard in index.shards)
    return f"{index.num_samples:,} samples of {classes:,} classes in {len(index.shards):,} shards, {size:,} bytes"


def _classes_of(index: Path) -> list[str] | None:
    """Returns the class names in the index that is about to be replaced; None: there is none that can be read."""
    try:
        return parse_index(index.read_bytes(), str(index)).classes
    except (OSError, InvalidDataError):
        return None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataNotFoundError(f"can't read the class names in {file}: {error}; give another --classes") from error


def _print(text: str) -> None:
    out.print(harmless(text), soft_wrap=True)
