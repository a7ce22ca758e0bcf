"""Rows of Parquet files, whose row groups are read whole. Memory holds a few row groups, whatever the files' size."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ngd_workers.contract.errors import DataNotFoundError, InvalidDataError
from ngd_workers.contract.spec import Parquet
from ngd_workers.data.base import Dataset, Shards
from ngd_workers.data.table import table_dataset

__all__ = ["load"]


class RowGroups:
    """The rows of files, one file after the other. The `kept` row groups that were last used stay in memory."""

    def __init__(self, files: Sequence[Path], wanted: Sequence[str], kept: int) -> None:
        self._kept = kept
        self._places: list[tuple[Path, int]] = []
        self.sizes: list[int] = []
        self.columns: Sequence[str] = ()
        for path in files:
            with _whole(path):
                metadata = pq.ParquetFile(path).metadata
            names = metadata.schema.to_arrow_schema().names
            self.columns = self.columns or names
            if set(wanted) & set(self.columns) != set(wanted) & set(names):
                raise InvalidDataError(f"{path} has other columns than {files[0]}: {names}; give each part files alike")
            for group in range(metadata.num_row_groups):
                if rows := metadata.row_group(group).num_rows:
                    self._places.append((path, group))
                    self.sizes.append(rows)
        self._wanted = [name for name in wanted if name in self.columns]
        self._starts = [0, *accumulate(self.sizes)]
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()

    def __len__(self) -> int:
        return self._starts[-1]

    def table(self, index: int) -> tuple[pa.Table, int]:
        place = bisect_right(self._starts, index) - 1
        if place not in self._cache:
            while len(self._cache) >= self._kept:
                self._cache.popitem(last=False)
            self._cache[place] = self._read(place, self._wanted)
        self._cache.move_to_end(place)
        return self._cache[place], index - self._starts[place]

    def name(self, index: int) -> str:
        place = bisect_right(self._starts, index) - 1
        path, group = self._places[place]
        return f"{path}, row {index - self._starts[place]} of row group {group}"

    def values(self, column: str) -> Iterator[pa.ChunkedArray]:
        return (self._read(place, [column]).column(column) for place in range(len(self._places)))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": OrderedDict()}

    def _read(self, place: int, columns: Sequence[str]) -> pa.Table:
        path, group = self._places[place]
        # The file is opened again for each row group: no handle is shared with a forked process. One thread: the
        # loader has processes of its own.
        with _whole(path), pq.ParquetFile(path) as file:
            return file.read_row_group(group, columns=list(columns), use_threads=False)


def load(choice: Parquet, data_dir: Path | None) -> Dataset:
    """Returns the rows of the two parts. Raises: DataNotFoundError, InvalidDataError, SpecError."""
    columns = [name for name in (choice.image, *choice.features, choice.label, *choice.target) if name is not None]
    kept = choice.window + 1  # a window of as many rows may begin in the midst of a row group
    train = RowGroups(_files("train", choice.train, data_dir), columns, kept)
    test = RowGroups(_files("test", choice.test, data_dir), columns, kept)
    # One lane: with several a worker would keep the window of each.
    shards = Shards(sizes=tuple(train.sizes), lanes=1, window=choice.window)
    return table_dataset(choice, train, test, classes=None, shards=shards)


def _files(part: str, paths: Sequence[str], data_dir: Path | None) -> list[Path]:
    files: list[Path] = []
    for given in paths:
        path = Path(given) if Path(given).is_absolute() else (data_dir or Path()) / given
        if not path.exists():
            raise DataNotFoundError(
                f"no file or folder {path} (data.{part} has {given!r}); set NGD_DATA_DIR or --data-dir to the folder "
                "that holds it, or give an absolute path"
            )
        files += sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise DataNotFoundError(f"data.{part} has no *.parquet file in {', '.join(paths)}; give another folder")
    return files


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise InvalidDataError(f"{path} is not a whole Parquet file: {error}; get it again") from error
