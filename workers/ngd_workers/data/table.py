"""Samples in the rows of tables: an image or numbers, and a class or numbers to predict."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from ngd_workers.contract.errors import InvalidDataError, SpecError
from ngd_workers.contract.spec import ImageSettings, Table
from ngd_workers.contract.spec_problems import did_you_mean
from ngd_workers.data.base import Dataset, Shards, Vectors
from ngd_workers.data.images import image_dataset

__all__ = ["Rows", "table_dataset"]


class Rows(Protocol):
    """The rows of one part. They must be picklable."""

    columns: Sequence[str]

    def __len__(self) -> int: ...
    def table(self, index: int, /) -> tuple[pa.Table, int]:
        """Returns a table that has the row, and the row's place in it. Raises: InvalidDataError."""
        ...

    def name(self, index: int, /) -> str:
        """Returns the file that the row is in, and where in it, for an error's text."""
        ...

    def values(self, column: str, /) -> Iterator[pa.ChunkedArray]:
        """Yields the values of a column, piece by piece."""
        ...


def table_dataset(choice: Table, train: Rows, test: Rows, classes: int | None, shards: Shards | None) -> Dataset:
    """Returns the samples of both parts. classes: as the table's own schema tells them. Raises: SpecError."""
    for part, rows in (("train", train), ("test", test)):
        for column in filter(None, (choice.image, *choice.features, choice.label, *choice.target)):
            if column not in rows.columns:
                hint = did_you_mean(column, rows.columns) or f"its columns are {', '.join(rows.columns)}"
                raise SpecError(f"data.{part} has no column {column!r} ({hint})")
    if choice.label is not None:
        classes = choice.classes or classes or _classes(train, choice.label)
    skips = choice.on_bad_sample == "skip"
    if choice.image is not None and choice.label is not None:
        assert classes is not None
        return image_dataset(
            Files(train, choice.image, choice.label, classes),
            Files(test, choice.image, choice.label, classes),
            classes,
            choice.images or ImageSettings(),
            skips_bad_samples=skips,
            shards=shards,
        )
    numbers = Numbers(train, choice, classes)
    x, y = numbers[0]
    return Dataset(
        numbers,
        Numbers(test, choice, classes),
        shape=Vectors(width=len(x), outputs=classes or len(y)),
        shards=shards,
        skips_bad_samples=skips,
    )


class Files:
    """Image files in a column, each with its class."""

    def __init__(self, rows: Rows, image: str, label: str, classes: int) -> None:
        self._rows, self._image, self._label, self._classes = rows, image, label, classes
        self.name = rows.name

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        table, row = self._rows.table(index)
        content = table.column(self._image)[row].as_py()
        if isinstance(content, dict):  # Hugging Face's images: {"bytes": ..., "path": ...}
            content = content.get("bytes")
        if not isinstance(content, bytes):
            raise InvalidDataError(
                f"column {self._image!r} must hold the bytes of image files, got {type(content).__name__}"
            )
        return content, _class(table.column(self._label)[row].as_py(), self._label, self._classes)


class Numbers:
    """Samples (x, y): x float32 [width]; y a class, or float32 [outputs]."""

    def __init__(self, rows: Rows, choice: Table, classes: int | None) -> None:
        self._rows, self._choice, self._classes = rows, choice, classes

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        try:
            table, row = self._rows.table(index)
            x = _numbers(table, row, self._choice.features)
            if self._choice.label is None:
                return x, _numbers(table, row, self._choice.target)
            assert self._classes is not None
            return x, _class(table.column(self._choice.label)[row].as_py(), self._choice.label, self._classes)
        except InvalidDataError as error:
            raise InvalidDataError(f"sample {index}, {self._rows.name(index)}: {error}") from error


def _numbers(table: pa.Table, row: int, columns: Sequence[str]) -> Tensor:
    numbers: list[float] = []
    for column in columns:
        value = table.column(column)[row].as_py()
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(each, int | float) for each in values):
            raise InvalidDataError(f"column {column!r} must hold numbers, or lists of them, got {value!r:.80}")
        numbers += values
    return torch.tensor(numbers, dtype=torch.float32)


def _class(label: object, column: str, classes: int) -> int:
    if not isinstance(label, int) or not 0 <= label < classes:
        raise InvalidDataError(
            f"column {column!r} must hold classes, whole numbers in [0, {classes}), got {label!r:.80}; check "
            "data.classes"
        )
    return label


def _classes(rows: Rows, column: str) -> int:
    largest = -1
    for values in rows.values(column):
        if not pa.types.is_integer(values.type):
            raise InvalidDataError(f"column {column!r} must hold classes, whole numbers from 0, got {values.type}")
        if len(values) > values.null_count:
            largest = max(largest, pc.max(values).as_py())
    return largest + 1
