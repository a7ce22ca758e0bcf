"""Data sets that Hugging Face's `datasets` has saved on disk: rows of memory-mapped Arrow files."""

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ngd_workers.contract.errors import InvalidDataError, SpecError
from ngd_workers.contract.spec import HuggingFace
from ngd_workers.data.base import Dataset
from ngd_workers.data.folder import find_folder
from ngd_workers.data.table import table_dataset

__all__ = ["load"]

VALUES_AT_ONCE = 100_000


class SavedRows:
    """The rows of one part, in its order, which may be that of a selection."""

    def __init__(self, part: Any, place: str) -> None:
        self._part, self._place = part.with_format("arrow"), place
        self.columns: Sequence[str] = part.column_names

    def __len__(self) -> int:
        return len(self._part)

    def table(self, index: int) -> tuple[pa.Table, int]:
        return self._part[index : index + 1], 0

    def name(self, index: int) -> str:
        return f"{self._place}, row {index}"

    def values(self, column: str) -> Iterator[pa.ChunkedArray]:
        alone = self._part.select_columns([column])
        for begin in range(0, len(alone), VALUES_AT_ONCE):
            yield alone[begin : begin + VALUES_AT_ONCE].column(column)


def load(choice: HuggingFace, data_dir: Path | None) -> Dataset:
    """Returns the rows of the two parts. Raises: DataNotFoundError, InvalidDataError, SpecError."""
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise SpecError(
            f"data huggingface needs the library datasets: {error}; install ngd-workers[datasets] where the workers run"
        ) from error
    folder = find_folder(choice.directory, data_dir)
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # pyarrow, JSON and datasets raise anything for a damaged folder
        raise InvalidDataError(f"{folder} is not what datasets' save_to_disk writes: {error}") from error
    if not isinstance(saved, dict):
        raise SpecError(f"{folder} holds one part; save a DatasetDict with the parts {choice.train} and {choice.test}")
    for setting, name in (("train", choice.train), ("test", choice.test)):
        if name not in saved:
            raise SpecError(f"data.{setting} must be one of the parts of {folder}, {', '.join(saved)}, got {name!r}")
    train, test = (SavedRows(saved[name], f"{folder}, part {name}") for name in (choice.train, choice.test))
    label = saved[choice.train].features.get(choice.label) if choice.label else None
    return table_dataset(choice, train, test, classes=getattr(label, "num_classes", None), shards=None)
