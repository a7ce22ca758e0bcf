"""Packs labelled images, of a folder or of a zip file of one, into shards with an index."""

import io
import random
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from ngd_workers.contract.errors import DataNotFoundError, InvalidDataError, SpecError, StorageError
from ngd_workers.shards.folder import files_below, same_classes, sorted_into_classes
from ngd_workers.shards.index import HEADER_BYTES, Index, Shard, write_index

__all__ = ["pack"]

Read = Callable[[str], bytes]
Done = Callable[[str, int, int], None]

ORDER_SEED = 0
SHARD_NAME = "shard-{:06d}.tar"
LONGEST_STEM = 60  # a name in a USTAR header has at most 100 characters


def pack(
    source: Path,
    out: Path,
    parts: Sequence[str],
    done: Done,
    *,
    samples_per_shard: int | None = None,
    shard_bytes: int | None = None,
) -> dict[str, Index]:
    """Makes `out/<part>/` with shards and index.json for each part of `source`; returns the indices.

    source: a folder, or a zip file, with `<part>/<class>/<image>`. A shard ends with `samples_per_shard` samples, or
    before it would exceed `shard_bytes`; each holds images of all classes, in an order that depends on their names
    alone. done: called with the part, its images packed, and all. `out` appears when it is whole.
    Raises: one of the WorkerErrors.
    """
    partial = out.with_name(out.name + ".partial")
    if out.exists():
        raise SpecError(f"{out} exists; give another folder, or remove it")
    with _opened(source) as (names, read):
        listed = {part: _part(names, part, source) for part in parts}
        for part in parts[1:]:
            same_classes(listed[parts[0]][0], listed[part][0], f"{source}/{parts[0]}", f"{source}/{part}")
        try:
            partial.mkdir(parents=True)
        except FileExistsError as error:
            raise SpecError(
                f"{partial} exists: another packing is at work there, or one was killed; remove it in that case"
            ) from error
        try:
            indices = {}
            for part, (classes, images) in listed.items():
                (partial / part).mkdir(parents=True)
                writer = _Writer(partial / part, samples_per_shard, shard_bytes)
                random.Random(ORDER_SEED).shuffle(images)
                for number, (name, label) in enumerate(images):
                    done(part, number, len(images))
                    writer.add(f"{part}/{name}", read(f"{part}/{name}"), label)
                done(part, len(images), len(images))
                indices[part] = Index(classes=classes, shards=writer.close())
                write_index(indices[part], partial / part)
            partial.rename(out)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise StorageError(f"can't pack {source} into {out}: {error}") from error
            raise
    return indices


@contextmanager
def _opened(source: Path) -> Iterator[tuple[list[str], Read]]:
    """Gives the names of all files and folders of the source, and the function that reads a file."""
    if source.is_dir():
        yield files_below(source), lambda name: (source / name).read_bytes()
        return
    try:
        with zipfile.ZipFile(source) as archive:

            def read(name: str) -> bytes:
                try:
                    return archive.read(name)
                except zipfile.BadZipFile as error:
                    raise InvalidDataError(f"{source} is damaged at {name}: {error}; get it again") from error

            yield archive.namelist(), read
    except FileNotFoundError as error:
        raise DataNotFoundError(f"no folder or zip file {source}") from error
    except zipfile.BadZipFile as error:
        raise InvalidDataError(f"{source} is neither a folder nor a whole zip file: {error}") from error


def _part(names: list[str], part: str, source: Path) -> tuple[list[str], list[tuple[str, int]]]:
    below = [name[len(part) + 1 :] for name in names if name.startswith(f"{part}/") and name != f"{part}/"]
    if not below:
        tops = sorted({PurePosixPath(name).parts[0] for name in names})
        raise DataNotFoundError(
            f"{source} holds no folder {part!r}, but {', '.join(tops[:5]) or 'nothing'}; name the parts by --train and "
            "--test"
        )
    return sorted_into_classes(below, f"{source}/{part}")


class _Writer:
    """Writes samples into one tar after another."""

    def __init__(self, folder: Path, samples_per_shard: int | None, shard_bytes: int | None) -> None:
        self._folder, self._most_samples, self._most_bytes = folder, samples_per_shard, shard_bytes
        self._shards: list[Shard] = []
        self._tar: tarfile.TarFile | None = None
        self._places: list[tuple[int, int, int]] = []
        self._count = 0

    def add(self, origin: str, image: bytes, label: int) -> None:
        if not image:
            raise InvalidDataError(f"{origin} is empty; remove it")
        path = PurePosixPath(origin)
        key = f"{self._count:08d}_{re.sub(r'[^A-Za-z0-9_-]', '_', path.stem)[:LONGEST_STEM]}"
        extension = path.suffix.lower().replace(".jpeg", ".jpg")
        label_text = str(label).encode()
        tar = self._with_room(2 * HEADER_BYTES + _padded(len(image)) + _padded(len(label_text)))
        self._places.append((tar.offset + HEADER_BYTES, len(image), label))
        for suffix, content in ((extension, image), (".cls", label_text)):
            member = tarfile.TarInfo(key + suffix)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        self._count += 1

    def close(self) -> list[Shard]:
        """Returns the shards that were written."""
        if self._tar is not None:
            self._tar.close()
            path = self._folder / SHARD_NAME.format(len(self._shards))
            offsets, lengths, labels = (list(column) for column in zip(*self._places, strict=True))
            size = path.stat().st_size
            self._shards.append(Shard(name=path.name, bytes=size, offsets=offsets, lengths=lengths, labels=labels))
            self._tar, self._places = None, []
        return self._shards

    def _with_room(self, size: int) -> tarfile.TarFile:
        is_full = self._most_samples is not None and len(self._places) >= self._most_samples
        if self._tar is not None and self._most_bytes is not None:
            is_full = is_full or _with_end(self._tar.offset + size) > self._most_bytes
        if self._tar is None or is_full:
            self.close()
            path = self._folder / SHARD_NAME.format(len(self._shards))
            self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - closed by close()
        return self._tar


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _with_end(size: int) -> int:
    """Returns the size of a tar whose members end at `size`: two empty blocks, then whole records."""
    return -(-(size + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
