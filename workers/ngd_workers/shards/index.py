"""The index of a folder of shards: where in its tars each sample's image lies, and which class it has.

Shards are WebDataset's tars: neighbouring members `<key>.jpg` and `<key>.cls` are a sample. `index.json` lies beside
them.
"""

import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ngd_workers.contract.errors import DataNotFoundError, InvalidDataError
from ngd_workers.shards.folder import EXTENSIONS

__all__ = ["HEADER_BYTES", "INDEX_NAME", "Index", "Shard", "index_shards", "parse_index", "write_index"]

INDEX_NAME = "index.json"
HEADER_BYTES = 512  # of a member, right before its content
REMEDY = "make it with: ngd data index"


class Shard(BaseModel):
    """A tar file of `bytes` bytes; for each sample, where its image begins, how long it is, and its class."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[^/\\]+$")
    bytes: int = Field(ge=1)
    offsets: list[int]
    lengths: list[int]
    labels: list[int]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if not len(self.offsets) == len(self.lengths) == len(self.labels) > 0:
            raise ValueError(f"offsets, lengths and labels of {self.name} must be equally many, and at least one")
        if min(self.offsets) < HEADER_BYTES or min(self.lengths) < 1 or min(self.labels) < 0:
            raise ValueError(f"{self.name} has an offset below {HEADER_BYTES}, a length below 1 or a label below 0")
        if max(map(int.__add__, self.offsets, self.lengths)) > self.bytes:
            raise ValueError(f"{self.name} has a sample that ends after its {self.bytes} bytes")
        return self


class Index(BaseModel):
    """The shards of one part of a data set, in order. classes: their names by number, if they have names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["ngd-shards"] = "ngd-shards"
    version: Literal[1] = 1
    classes: list[str] | None = None
    shards: list[Shard] = Field(min_length=1)

    @model_validator(mode="after")
    def _labels_have_names(self) -> Self:
        if self.classes is not None and self.num_labels > len(self.classes):
            raise ValueError(f"label {self.num_labels - 1} has no name: there are {len(self.classes)} classes")
        return self

    @property
    def num_samples(self) -> int:
        return sum(len(shard.labels) for shard in self.shards)

    @property
    def num_labels(self) -> int:
        """The largest label + 1."""
        return max(max(shard.labels) for shard in self.shards) + 1


def parse_index(text: bytes, where: str) -> Index:
    """Returns the index in the bytes of a file. Raises: InvalidDataError."""
    try:
        return Index.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise InvalidDataError(
            f"{where} is no index of shards: {place + ': ' if place else ''}{first['msg']}; {REMEDY}"
        ) from error


def write_index(index: Index, folder: Path) -> None:
    """Writes index.json, whole or not at all."""
    partial = folder / f".{INDEX_NAME}.partial"
    partial.write_text(index.model_dump_json() + "\n")
    os.replace(partial, folder / INDEX_NAME)


def index_shards(folder: Path, classes: list[str] | None, done: Callable[[int, int], None]) -> Index:
    """Returns the index of the *.tar files of a folder, from one pass over their headers.

    Labels are the numbers in the `.cls` members. If these hold texts, they are class names, numbered in order.
    classes: names by number. done: called with the shards that are read, and all. Raises: one of the WorkerErrors.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataNotFoundError(f"{folder} holds no *.tar file; give the folder of the shards")
    scanned: list[list[tuple[int, int, str]]] = []
    for number, path in enumerate(paths):
        done(number, len(paths))
        scanned.append(list(_samples(path)))
    done(len(paths), len(paths))
    texts = sorted({text for samples in scanned for _, _, text in samples})
    if not all(text.isdecimal() and text.isascii() for text in texts):
        classes = classes or texts
        if unknown := sorted(set(texts) - set(classes)):
            raise InvalidDataError(f"{folder}: the label {unknown[0]!r} is none of the {len(classes)} given classes")
        numbers = {text: classes.index(text) for text in texts}
    else:
        numbers = {text: int(text) for text in texts}
        if classes is not None and max(numbers.values()) >= len(classes):
            raise InvalidDataError(
                f"{folder}: label {max(numbers.values())} has no name among the {len(classes)} given classes"
            )
    shards = [
        Shard(
            name=path.name,
            bytes=path.stat().st_size,
            offsets=[offset for offset, _, _ in samples],
            lengths=[length for _, length, _ in samples],
            labels=[numbers[text] for _, _, text in samples],
        )
        for path, samples in zip(paths, scanned, strict=True)
    ]
    return Index(classes=classes, shards=shards)


def _samples(path: Path) -> Iterator[tuple[int, int, str]]:
    """Yields (offset, length, label) of each sample of a tar file."""
    key, count = "", 0
    image: tuple[int, int] | None = None
    label: str | None = None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                folder, slash, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                if folder + slash + stem != key:
                    if key:
                        yield _whole(path, key, image, label)
                    key, image, label, count = folder + slash + stem, None, None, count + 1
                if extension == "cls" and (content := tar.extractfile(member)) is not None:
                    label = content.read().decode("utf-8").strip()
                elif f".{extension.lower()}" in EXTENSIONS:
                    if image is not None:
                        raise InvalidDataError(f"{path}: sample {key} has two images; a sample has one")
                    image = member.offset_data, member.size
    except (tarfile.TarError, UnicodeDecodeError, EOFError) as error:
        raise InvalidDataError(f"{path} is no whole tar file: {error}; get it again, or unpack it if packed") from error
    if not count:
        raise InvalidDataError(f"{path} holds no sample; remove it")
    if image is not None and sum(image) > path.stat().st_size:
        raise InvalidDataError(f"{path} is cut within sample {key}; get it again")
    yield _whole(path, key, image, label)


def _whole(path: Path, key: str, image: tuple[int, int] | None, label: str | None) -> tuple[int, int, str]:
    if image is None or not label:
        raise InvalidDataError(f"{path}: sample {key} has no {'image' if image is None else 'label (.cls)'}")
    return *image, label
