"""Uploads from a browser: unpacked inside of their folder, never beyond its bounds, refused in one sentence."""

import io
import tarfile
import zipfile
from contextlib import nullcontext
from pathlib import Path

import pytest

from ngd_service.client import unpacking
from ngd_service.client.unpacking import unpack_upload
from ngd_workers.contract.errors import SpecError


def zipped(**files: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return content.getvalue()


def tarred(**files: str) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return content.getvalue()


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(("pack", "name"), [(zipped, "A.ZIP"), (tarred, "a.tar.gz"), (tarred, "a.tgz")])
def test_archive_of_a_folder_is_that_folder(tmp_path: Path, pack: object, name: str) -> None:
    content = pack(**{"mine/mine.py": "x", "mine/inner/utils.py": "y"})  # type: ignore[operator]

    unpack_upload({name: content}, tmp_path)

    assert names(tmp_path) == ["inner/utils.py", "mine.py"]


def test_files_come_by_themselves_too(tmp_path: Path) -> None:
    unpack_upload({"mine.py": b"x", "../../utils.py": b"y", "data.zip": zipped(a="b")}, tmp_path / ".")

    assert names(tmp_path) == ["data.zip", "mine.py", "utils.py"]


@pytest.mark.parametrize(("pack", "name"), [(zipped, "a.zip"), (tarred, "a.tar")])
def test_nothing_lands_outside(tmp_path: Path, pack: object, name: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    content = pack(**{"../out.py": "x", "inside.py": "y"})  # type: ignore[operator]

    with nullcontext() if name == "a.zip" else pytest.raises(SpecError, match=r"a\.tar can't be unpacked"):
        unpack_upload({name: content}, folder)

    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(("pack", "name"), [(zipped, "a.zip"), (tarred, "a.tar.gz")])
def test_bounds_and_broken_archives_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: object, name: str
) -> None:
    content = pack(mine="x" * 3000)  # type: ignore[operator]
    with pytest.raises(SpecError, match=f"{name} can't be unpacked"):
        unpack_upload({name: content[:-40] if name == "a.zip" else b"no archive"}, tmp_path)

    monkeypatch.setattr(unpacking, "MAX_UNPACKED_BYTES", 2048)

    with pytest.raises(SpecError, match=f"{name} holds more than 0 MiB once it is unpacked"):
        unpack_upload({name: content}, tmp_path)
