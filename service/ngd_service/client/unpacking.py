"""Archives from elsewhere, unpacked into a folder: nothing lands outside of it, and no more than code may have."""

import io
import lzma
import shutil
import tarfile
import zipfile
import zlib
from pathlib import Path

from ngd_workers.contract.errors import SpecError
from ngd_workers.contract.spec.code import MAX_UNPACKED_BYTES

__all__ = ["unpack", "unpack_upload"]

TAR_NAMES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
BROKEN = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, NotImplementedError, RuntimeError)


def unpack_upload(uploads: dict[str, bytes], folder: Path) -> None:
    """Puts files into the folder, by name; a zip or a tar that comes alone is unpacked there.

    If all of an archive lies in one folder, what is in that one counts. Raises: SpecError.
    """
    if len(uploads) == 1:
        ((name, content),) = uploads.items()
        if name.lower().endswith((".zip", *TAR_NAMES)):
            unpack(content, folder, name)
            _lift(folder)
            return
    for name, content in uploads.items():
        plain = Path(name).name
        if not plain or plain in (".", ".."):
            raise SpecError(f"{name!r} is no name of a file; rename it")
        (folder / plain).write_bytes(content)


def unpack(content: bytes, folder: Path, name: str = "code.tar.gz") -> None:
    """Unpacks a zip or a tar, which `name` tells, into the folder. Raises: SpecError."""
    try:
        (_unpack_zip if name.lower().endswith(".zip") else _unpack_tar)(content, folder, name)
    except BROKEN as error:
        raise SpecError(f"{name} can't be unpacked: {error}; pack the folder again as .zip or .tar.gz") from error


def _unpack_tar(content: bytes, folder: Path, name: str) -> None:
    left = MAX_UNPACKED_BYTES
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive:
            left = _left(left, member.size, name)
            archive.extract(member, folder, filter="data")  # refuses what would lie outside of the folder


def _unpack_zip(content: bytes, folder: Path, name: str) -> None:
    left = MAX_UNPACKED_BYTES
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for member in archive.infolist():
            left = _left(left, member.file_size, name)  # zipfile reads no more of a member than this
            archive.extract(member, folder)  # takes `..` and the root out of its name


def _left(left: int, size: int, name: str) -> int:
    if size > left:
        limit = MAX_UNPACKED_BYTES >> 20
        raise SpecError(f"{name} holds more than {limit} MiB once it is unpacked; leave out what is no code")
    return left - size


def _lift(folder: Path) -> None:
    """Moves what lies in the only folder up into this one."""
    entries = [entry for entry in folder.iterdir() if entry.name != "__MACOSX"]
    if len(entries) == 1 and entries[0].is_dir():
        inner = entries[0].rename(folder / ".lifted")
        for entry in inner.iterdir():
            shutil.move(entry, folder / entry.name)
        inner.rmdir()
