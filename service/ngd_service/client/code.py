"""Packs the folder of a user's code: the same files always make the same archive, which its SHA-256 names."""

import gzip
import hashlib
import io
import os
import stat
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from ngd_service.client.endpoints import Spec
from ngd_service.client.units import binary_bytes
from ngd_workers.contract.errors import SpecError
from ngd_workers.contract.spec import Code
from ngd_workers.contract.spec.code import MAX_ARCHIVE_BYTES, MAX_UNPACKED_BYTES

__all__ = ["Archive", "Shipment", "pack"]

NEVER = frozenset({".git", "__pycache__", ".venv"})
ENVIRONMENT = "pyvenv.cfg"  # stands in each virtual environment, whatever its name
IGNORE = ".gitignore"
NUM_LARGEST = 5
LEAVE_OUT = "name it in code.exclude or in .gitignore"


@dataclass(frozen=True, slots=True)
class Archive:
    """A packed folder. sha256: of the content. num_files: files in it."""

    content: bytes
    sha256: str
    num_files: int


@dataclass(frozen=True, slots=True)
class Shipment:
    """A spec that may be submitted, for its code is at the service. archive: the code; None: the spec has none.

    was_there: whether the service had the same archive already.
    """

    spec: Spec
    archive: Archive | None = None
    was_there: bool = False

    def __str__(self) -> str:
        if self.archive is None:
            return "no code to ship"
        what = "code unchanged" if self.was_there else "code shipped"
        files = "1 file" if self.archive.num_files == 1 else f"{self.archive.num_files} files"
        return f"{what}: {files}, {binary_bytes(len(self.archive.content))}"


def pack(code: Code, root: Path) -> Archive:
    """Returns the folder that `code.directory` names, from `root` on, as a tar.gz. Raises: SpecError."""
    folder = (root / code.directory).resolve()
    if not folder.is_dir():
        raise SpecError(f"code.directory is {code.directory!r}, and there is no folder {folder}; correct it")
    try:
        files = sorted(_files(folder, code))
        _check(files, folder, code)
        content = _archive(files, folder)
    except OSError as error:
        raise SpecError(f"can't read {error.filename or folder}: {error.strerror}; {LEAVE_OUT}") from error
    if len(content) > MAX_ARCHIVE_BYTES:
        raise _too_large(f"{binary_bytes(len(content))} packed", MAX_ARCHIVE_BYTES, files, folder)
    return Archive(content, hashlib.sha256(content).hexdigest(), len(files))


def _files(folder: Path, code: Code) -> Iterator[str]:
    """Yields the paths, from the folder on, of the files to ship."""
    rules = _Rules(folder, code)
    waiting = [(folder, False)]
    while waiting:
        place, is_ignored = waiting.pop()
        rules.read(place)
        with os.scandir(place) as entries:
            for entry in entries:
                path = Path(entry.path)
                is_folder = entry.is_dir(follow_symlinks=False)
                if entry.name in NEVER or rules.excludes(path, is_folder=is_folder):
                    continue
                ignored = is_ignored or rules.ignores(path, is_folder=is_folder)
                if is_folder:
                    # Git itself looks for nothing in an ignored folder; code.include may name a file in there.
                    if not (path / ENVIRONMENT).exists() and (code.include or not ignored):
                        waiting.append((path, ignored))
                elif not ignored or rules.includes(path):
                    _check_kind(path, folder)
                    yield path.relative_to(folder).as_posix()


class _Rules:
    """Which paths the .gitignore files, those of the repository around the folder among them, and the job leave out."""

    def __init__(self, folder: Path, code: Code) -> None:
        self._folder = folder
        self._ignoring: dict[Path, GitIgnoreSpec] = {}
        self._include = _patterns(code.include, "code.include")
        self._exclude = _patterns(code.exclude, "code.exclude")
        for place in _up_to_the_repository(folder):
            self.read(place)
        if self.ignores(folder, is_folder=True):  # asked for by name: then the rules above are not meant for it
            self._ignoring.clear()

    def read(self, place: Path) -> None:
        file = place / IGNORE
        if file.is_file():
            lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
            self._ignoring[place] = _patterns(lines, str(file))

    def ignores(self, path: Path, *, is_folder: bool) -> bool:
        """Returns what the nearest .gitignore with a word about the path says; one without a word asks the next."""
        for place in path.parents:
            if place in self._ignoring:
                verdict = self._ignoring[place].check_file(_name(path, place, is_folder=is_folder)).include
                if verdict is not None:
                    return verdict
        return False

    def includes(self, path: Path) -> bool:
        return self._include.match_file(_name(path, self._folder, is_folder=False))

    def excludes(self, path: Path, *, is_folder: bool) -> bool:
        return self._exclude.match_file(_name(path, self._folder, is_folder=is_folder))


def _up_to_the_repository(folder: Path) -> list[Path]:
    """Returns the folders around this one, up to that of its git repository; none outside of any."""
    around = [folder, *folder.parents]
    repository = next((index for index, place in enumerate(around) if (place / ".git").exists()), 0)
    return around[1 : repository + 1]


def _name(path: Path, place: Path, *, is_folder: bool) -> str:
    return path.relative_to(place).as_posix() + ("/" if is_folder else "")


def _patterns(lines: Sequence[str], where: str) -> GitIgnoreSpec:
    try:
        return GitIgnoreSpec.from_lines(lines)
    except ValueError as error:
        raise SpecError(f"{where} has a pattern that .gitignore files don't have: {error}") from error


def _check_kind(path: Path, folder: Path) -> None:
    """Raises: SpecError for what can't be shipped as one file of the folder."""
    name = path.relative_to(folder)
    if path.is_symlink():
        target = path.resolve()
        if not target.exists():
            raise SpecError(f"{name} is a link to {target}, which is not there; remove it, or {LEAVE_OUT}")
        if target.is_dir():
            raise SpecError(f"{name} is a link to the folder {target}; copy the folder here, or {LEAVE_OUT}")
        if not target.is_relative_to(folder):
            raise SpecError(
                f"{name} is a link to {target}, outside of {folder}; copy the file here, or {LEAVE_OUT}; data belong "
                "where the workers find them, such as NGD_DATA_DIR"
            )
    if not path.is_file():
        raise SpecError(f"{name} is neither a file nor a folder; {LEAVE_OUT}")


def _check(files: Sequence[str], folder: Path, code: Code) -> None:
    if not files:
        raise SpecError(
            f"there is no file to ship in {folder} (code.directory is {code.directory!r}): it is empty, or .gitignore "
            "and code.exclude leave out everything; code.include names files that are shipped all the same"
        )
    if code.requirements is not None and code.requirements not in files:
        raise SpecError(f"code.requirements is {code.requirements!r}, and no such file is shipped from {folder}")
    size = sum(_size(folder / name) for name in files)
    if size > MAX_UNPACKED_BYTES:
        raise _too_large(binary_bytes(size), MAX_UNPACKED_BYTES, files, folder)


def _too_large(size: str, bound: int, files: Sequence[str], folder: Path) -> SpecError:
    largest = sorted(files, key=lambda name: _size(folder / name), reverse=True)[:NUM_LARGEST]
    named = ", ".join(f"{name} ({binary_bytes(_size(folder / name))})" for name in largest)
    return SpecError(
        f"the code in {folder} has {size}, and {binary_bytes(bound)} may be shipped; the largest files are {named}: "
        "leave out what is no code with code.exclude or .gitignore"
    )


def _size(path: Path) -> int:
    return path.stat().st_size


def _archive(files: Sequence[str], folder: Path) -> bytes:
    """Returns a tar.gz without anything that differs between two copies of the folder: times, owners, most modes."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile(filename="", fileobj=packed, mode="wb", mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name in files:
            content = (folder / name).read_bytes()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.mode = 0o755 if (folder / name).stat().st_mode & stat.S_IXUSR else 0o644
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()
