"""Images in tar shards with an index: on a disk, or far away.

Each sample is read together with its header in the tar, which says whether the index is that of this tar.
"""

from array import array
from bisect import bisect_right
from itertools import accumulate, chain
from pathlib import Path

from ngd_workers.contract.errors import InvalidDataError
from ngd_workers.contract.spec import WebDataset
from ngd_workers.data.base import Dataset, Shards
from ngd_workers.data.file_cache import FileCache
from ngd_workers.data.folder import find_folder
from ngd_workers.data.images import image_dataset
from ngd_workers.data.storage import CachedFolder, LocalFolder, RemoteFolder, Storage
from ngd_workers.shards.folder import same_classes
from ngd_workers.shards.index import HEADER_BYTES, INDEX_NAME, Index, parse_index

__all__ = ["ShardImages", "load"]

SIZE_FIELD = slice(124, 136)  # of a member's header: octal digits
NAME_FIELD = slice(0, 100)


class ShardImages:
    """The image files in the shards of one part, in the order of the index."""

    def __init__(self, storage: Storage, index: Index) -> None:
        self._storage = storage
        self._shards = [(shard.name, shard.bytes) for shard in index.shards]
        self.sizes = tuple(len(shard.labels) for shard in index.shards)
        self._ends = list(accumulate(self.sizes))
        self._offsets, self._lengths, self._labels = (
            array("q", chain.from_iterable(getattr(shard, column) for shard in index.shards))
            for column in ("offsets", "lengths", "labels")
        )

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        length = self._lengths[index]
        name, size = self._shards[self._shard_of(index)]
        begin = self._offsets[index] - HEADER_BYTES
        content = self._storage.read_range(name, size, begin, HEADER_BYTES + length)
        if len(content) != HEADER_BYTES + length:
            raise InvalidDataError(
                f"{len(content)} bytes came where {HEADER_BYTES + length} were asked for: the shard is cut"
            )
        if _size_in(content) != length:
            raise InvalidDataError(
                f"no member of {length} bytes is at byte {begin} of the shard, as its index says: the index is "
                "another tar's; index it by: ngd data index"
            )
        return content[HEADER_BYTES:], self._labels[index]

    def name(self, index: int) -> str:
        name, size = self._shards[self._shard_of(index)]
        begin = self._offsets[index] - HEADER_BYTES
        try:
            header = self._storage.read_range(name, size, begin, HEADER_BYTES)
            member = header[NAME_FIELD].rstrip(b"\0").decode() if len(header) == HEADER_BYTES else ""
        except Exception:  # noqa: BLE001 - the name is for an error's text, which must not be lost to another error
            member = ""
        return self._storage.where(name) + (f" ({member})" if member.isprintable() and member else "")

    def _shard_of(self, index: int) -> int:
        return bisect_right(self._ends, index)


def load(choice: WebDataset, data_dir: Path | None) -> Dataset:
    """Returns the two parts of the shards. Raises: one of the WorkerErrors about data."""
    (train, train_index), (test, test_index) = (_part(choice, part, data_dir) for part in (choice.train, choice.test))
    if train_index.classes is not None and test_index.classes is not None:
        same_classes(train_index.classes, test_index.classes, choice.train, choice.test)
    return image_dataset(
        train,
        test,
        max(len(index.classes or ()) or index.num_labels for index in (train_index, test_index)),
        choice.images,
        skips_bad_samples=choice.on_bad_sample == "skip",
        shards=Shards(train.sizes, choice.lanes, choice.window),
    )


def _part(choice: WebDataset, part: str, data_dir: Path | None) -> tuple[ShardImages, Index]:
    storage = _storage(choice, part, data_dir)
    index = parse_index(storage.read(INDEX_NAME), storage.where(INDEX_NAME))
    return ShardImages(storage, index), index


def _storage(choice: WebDataset, part: str, data_dir: Path | None) -> Storage:
    if "://" not in choice.directory:
        return LocalFolder(find_folder(choice.directory, data_dir) / part)
    remote = RemoteFolder(f"{choice.directory.rstrip('/')}/{part}", choice.storage_options)
    if choice.cache is None:
        return remote
    return CachedFolder(remote, FileCache(Path(choice.cache.directory), choice.cache.bytes))


def _size_in(header: bytes) -> int | None:
    try:
        return int(header[SIZE_FIELD].rstrip(b"\0 ") or b"x", 8)
    except ValueError:
        return None
