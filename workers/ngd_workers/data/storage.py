"""Reads ranges of files in a folder: on a disk, or far away, with or without a copy on a disk."""

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ngd_workers.contract.errors import DataNotFoundError, InvalidDataError, SpecError, StorageError, WorkerError
from ngd_workers.contract.patience import insist
from ngd_workers.data.file_cache import FileCache

__all__ = ["CachedFolder", "LocalFolder", "RemoteFolder", "Storage"]

MOST_OPEN_FILES = 64  # of one process and part; the usual limit is 1024
PATIENCE_S = 30.0  # a server's restart
CONNECT_S, SILENCE_S = 30.0, 60.0


class Storage(Protocol):
    """The files of one folder. It can be sent to another process, and used after a fork."""

    def read(self, name: str) -> bytes:
        """Returns a whole file. Raises: DataNotFoundError, StorageError."""
        ...

    def read_range(self, name: str, size: int, begin: int, length: int) -> bytes:
        """Returns `length` bytes from `begin` of a file that should have `size` bytes.

        Raises: DataNotFoundError, InvalidDataError if the file has another size, SpecError, StorageError.
        """
        ...

    def where(self, name: str) -> str:
        """Returns the path or the URL of a file, for an error's text."""
        ...


class LocalFolder:
    """A folder on a disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: OrderedDict[str, int] = OrderedDict()  # descriptors; pread has no position that a fork would share

    def read(self, name: str) -> bytes:
        try:
            return (self._folder / name).read_bytes()
        except OSError as error:
            raise _local_error(self.where(name), error) from error

    def read_range(self, name: str, size: int, begin: int, length: int) -> bytes:
        try:
            return os.pread(self._descriptor(name, size), length, begin)
        except OSError as error:
            raise _local_error(self.where(name), error) from error

    def where(self, name: str) -> str:
        return str(self._folder / name)

    def _descriptor(self, name: str, size: int) -> int:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        while len(self._open) >= MOST_OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        self._open[name] = os.open(self._folder / name, os.O_RDONLY)
        if (actual := os.fstat(self._open[name]).st_size) != size:
            os.close(self._open.pop(name))
            raise wrong_size(actual, size)
        return self._open[name]

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_open": OrderedDict()}

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at the end of a process `os` may be gone
        for descriptor in self._open.values():
            close(descriptor)


class RemoteFolder:
    """A folder that fsspec opens by its URL: http(s)://, s3:// and others."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        self._url, self._options = url.rstrip("/"), options
        self._opened: tuple[int, Any] | None = None  # of which process; a file system doesn't outlive a fork

    def read(self, name: str) -> bytes:
        content: bytes = self._insist(name, lambda: self._fs().cat_file(self._path(name)))
        return content

    def read_range(self, name: str, size: int, begin: int, length: int) -> bytes:
        content: bytes = self._insist(
            name, lambda: self._fs().cat_file(self._path(name), start=begin, end=begin + length)
        )
        if len(content) > length:
            raise SpecError(
                f"{self.where(name)} came with {len(content)} bytes where {length} were asked for: the server does not "
                "know Range requests; give data.cache, or use another server"
            )
        return content

    def download(self, name: str, into: Path) -> None:
        """Writes a whole file to disk. Raises: DataNotFoundError, StorageError."""
        self._insist(name, lambda: self._fs().get_file(self._path(name), str(into)))

    def where(self, name: str) -> str:
        return f"{self._url}/{name}"

    def _path(self, name: str) -> str:
        return str(self._fs()._strip_protocol(self.where(name)))

    def _fs(self) -> Any:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), _file_system(self._url, self._options)
        return self._opened[1]

    def _insist(self, name: str, call: Any) -> Any:
        def translated() -> Any:
            try:
                return call()
            except WorkerError:
                raise
            except Exception as error:  # each file system has errors of its own
                raise _remote_error(self.where(name), error) from error

        return insist(translated, f"read {self.where(name)}", patience_s=PATIENCE_S)

    def __getstate__(self) -> dict[str, Any]:
        return {"_url": self._url, "_options": self._options, "_opened": None}


class CachedFolder:
    """A folder far away whose files are kept on a disk as long as there is room."""

    def __init__(self, remote: RemoteFolder, cache: FileCache) -> None:
        self._remote, self._cache = remote, cache
        self._unfit: dict[str, InvalidDataError] = {}  # else each sample would fetch the whole file again

    def read(self, name: str) -> bytes:
        return self._remote.read(name)

    def read_range(self, name: str, size: int, begin: int, length: int) -> bytes:
        def fetch(into: Path) -> None:
            self._remote.download(name, into)
            if (actual := into.stat().st_size) != size:
                self._unfit[name] = wrong_size(actual, size)
                raise self._unfit[name]

        if name in self._unfit:
            raise self._unfit[name]
        return self._cache.read_range(self.where(name), size, begin, length, fetch)

    def where(self, name: str) -> str:
        return self._remote.where(name)


def wrong_size(actual: int, size: int) -> InvalidDataError:
    """Returns the error of a file that is not the one that was indexed."""
    return InvalidDataError(
        f"the file has {actual} bytes and its index says {size}: it is cut, or the index is another tar's; get it "
        "again, or index it by: ngd data index"
    )


def _file_system(url: str, options: dict[str, Any]) -> Any:
    protocol = url.partition("://")[0]
    try:
        import fsspec

        if protocol in ("http", "https"):
            import aiohttp

            # its default ends any request after five minutes, a large shard's too
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
            options = {"client_kwargs": {"timeout": timeout}} | options
        return fsspec.filesystem(protocol, skip_instance_cache=True, **options)
    except (ImportError, ValueError, TypeError) as error:
        raise SpecError(
            f"can't open {url} with data.storage_options {sorted(options)}: {error}; S3 needs pip install "
            "'ngd-workers[s3]'"
        ) from error


def _local_error(where: str, error: OSError) -> Exception:
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return DataNotFoundError(f"can't read {where}: {error.strerror}")
    return StorageError(f"can't read {where}: {error}; check the volume")


def _remote_error(where: str, error: Exception) -> Exception:
    """Returns an OSError if it may pass, otherwise one of the WorkerErrors."""
    status = getattr(error, "status", None)  # of aiohttp
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return DataNotFoundError(f"there is no {where}; check data.directory")
    if isinstance(error, PermissionError) or status in (401, 403):
        return DataNotFoundError(f"no access to {where}: {error}; check the workers' keys")
    if status == 416:  # Range Not Satisfiable
        return InvalidDataError("the file ends before the range that its index names: it is cut; get it again")
    return OSError(f"{type(error).__name__}: {error}")
