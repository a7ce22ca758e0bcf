"""Packing a user's folder: which files go, under which name the archive goes, and what is refused."""

import io
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from ngd_service.client import code as packing
from ngd_service.client.code import pack
from ngd_workers.contract.errors import SpecError
from ngd_workers.contract.spec import Code
from tests.support.own_code import write


def names(folder: Path, **code: object) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(pack(Code(**code), folder).content)) as archive:
        return archive.getnames()


def test_same_files_make_the_same_archive(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {"b.py": "B\n", "a/run.sh": "A\n", "é.txt": ""})
    (folder / "a" / "run.sh").chmod(0o755)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    os.utime(copy / "b.py", (1, 1))
    (copy / "b.py").chmod(0o600)

    first, second = pack(Code(), folder), pack(Code(), copy)

    assert first == second
    assert first.num_files == 3
    (copy / "b.py").write_text("other\n")
    assert pack(Code(), copy).sha256 != first.sha256
    with tarfile.open(fileobj=io.BytesIO(first.content)) as archive:
        members = {member.name: (oct(member.mode), member.mtime, member.uid) for member in archive}
    assert members == {"a/run.sh": ("0o755", 0, 0), "b.py": ("0o644", 0, 0), "é.txt": ("0o644", 0, 0)}


def test_what_git_ignores_stays(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "mine",
        {
            ".gitignore": "*.pt\ndata/\n/run\n!kept.pt\n",
            "model.py": "",
            "a.pt": "",
            "kept.pt": "",
            "data/x.bin": "",
            "run/log": "",
            "deep/run/log": "",
            "deep/.gitignore": "*.log\n!*.pt\n",
            "deep/b.pt": "",
            "deep/c.log": "",
            ".git/config": "",
            "deep/__pycache__/m.pyc": "",
            ".venv/lib/x.py": "",
            "env/pyvenv.cfg": "",
            "env/lib/y.py": "",
        },
    )

    assert names(folder) == [".gitignore", "deep/.gitignore", "deep/b.pt", "deep/run/log", "kept.pt", "model.py"]
    assert names(folder, include=["data/", "a.pt"], exclude=["deep", ".gitignore"]) == [
        *("a.pt", "data/x.bin", "kept.pt", "model.py"),
    ]


def test_folder_inside_a_repository_keeps_to_the_rules_around_it(tmp_path: Path) -> None:
    write(tmp_path, {".git/config": "", ".gitignore": "*.pt\nscratch/\n", "job/a.py": "", "job/w.pt": "", "x.py": ""})
    write(tmp_path, {"scratch/b.py": "", "scratch/w.pt": ""})

    assert names(tmp_path / "job") == ["a.py"]
    assert names(tmp_path, directory="job") == ["a.py"]
    assert names(tmp_path, directory="scratch") == ["b.py", "w.pt"]  # ignored as a whole, and asked for


def test_link_to_a_file_of_the_folder_travels_as_a_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", {"deep/a.py": "A = 1\n"})
    (folder / "b.py").symlink_to("deep/a.py")

    with tarfile.open(fileobj=io.BytesIO(pack(Code(), folder).content)) as archive:
        member = archive.getmember("b.py")
        assert (member.isreg(), member.size) == (True, 6)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (
            "../out.py",
            r"link is a link to .*out\.py, outside of .*mine; copy the file here, or name it in code\.exclude",
        ),
        ("..", r"link is a link to the folder .*; copy the folder here"),
        ("deep", r"link is a link to the folder .*deep; copy the folder here"),
        ("nowhere", r"link is a link to .*nowhere, which is not there; remove it"),
    ],
)
def test_link_that_can_not_travel_is_named(tmp_path: Path, target: str, words: str) -> None:
    folder = write(tmp_path, {"out.py": "", "mine/deep/a.py": ""}) / "mine"
    (folder / "link").symlink_to(target)

    with pytest.raises(SpecError, match=words):
        pack(Code(), folder)
    assert names(folder, exclude=["link"]) == ["deep/a.py"]


def test_too_much_is_refused_with_the_largest_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "mine", {f"{n}.txt": "x" * n for n in range(1, 9)})
    (folder / "weights.bin").write_bytes(os.urandom(4000))

    monkeypatch.setattr(packing, "MAX_ARCHIVE_BYTES", 2048)
    with pytest.raises(
        SpecError, match=r"KiB packed, and 2 KiB may be shipped; the largest files are weights\.bin \(3"
    ):
        pack(Code(), folder)
    monkeypatch.setattr(packing, "MAX_UNPACKED_BYTES", 1024)
    with pytest.raises(
        SpecError, match=r"mine has 3\.9.* KiB, and 1 KiB may be .*8\.txt \(8 B\), .*5\.txt \(5 B\): leave"
    ):
        pack(Code(), folder)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ({"directory": "none"}, r"code\.directory is 'none', and there is no folder .*none; correct it"),
        ({"directory": "empty"}, r"no file to ship in .*empty \(code\.directory is 'empty'\)"),
        ({"exclude": ["*"]}, r"code\.exclude leave out everything"),
        ({"requirements": "r.txt"}, r"code\.requirements is 'r\.txt', and no such file is shipped"),
        ({"exclude": ["!"]}, r"code\.exclude has a pattern that \.gitignore files don't have"),
    ],
)
def test_folder_that_can_not_be_shipped_is_named(tmp_path: Path, code: dict[str, object], words: str) -> None:
    write(tmp_path, {"a.py": ""})
    (tmp_path / "empty").mkdir()

    with pytest.raises(SpecError, match=words):
        pack(Code(**code), tmp_path)
