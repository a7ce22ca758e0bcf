"""`ngd data pack` and `ngd data index` as a person calls them: what they make and print, and their exit status."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ngd_workers.shards.index import INDEX_NAME, parse_index
from tests.service.test_terminal import on_terminal
from tests.support.picture_files import picture_folder
from tests.support.service_process import NGD

PACKED = ("pictures", "pictures.zip")


def ngd_data(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Calls `ngd data` in the folder, without a terminal."""
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    command = [*NGD, "data", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a folder with pictures/ of eight and four images."""
    picture_folder(tmp_path / "pictures", {"train": 8, "val": 4})
    return tmp_path


def test_zip_file_is_packed_as_its_folder_is_and_indexed_again(folder: Path) -> None:
    shutil.make_archive(str(folder / "pictures"), "zip", folder / "pictures")
    (folder / "names").write_text("class0\nclass1\nclass2\n")

    packed = [ngd_data(folder, "pack", name, f"of-{name}", "--samples-per-shard", "3") for name in PACKED]
    index = (folder / "of-pictures" / "train" / INDEX_NAME).read_bytes()
    (folder / "of-pictures" / "train" / INDEX_NAME).unlink()
    indexed = ngd_data(folder, "index", "of-pictures/train", "--classes", "names")
    again = ngd_data(folder, "index", "of-pictures/train")  # the names that are there stay

    for name, command in zip(PACKED, packed, strict=True):
        assert (command.returncode, command.stderr) == (0, "")
        assert command.stdout == (
            f"of-{name}/train: 8 samples of 3 classes in 3 shards, 30,720 bytes\n"
            f"of-{name}/val: 4 samples of 3 classes in 2 shards, 20,480 bytes\n"
        )
    assert (folder / "of-pictures.zip" / "train" / INDEX_NAME).read_bytes() == index
    assert (indexed.returncode, indexed.stderr) == (again.returncode, again.stderr) == (0, "")
    assert indexed.stdout.startswith(f"of-pictures/train/{INDEX_NAME}: 8 samples of 3 classes in 3 shards")
    assert parse_index((folder / "of-pictures" / "train" / INDEX_NAME).read_bytes(), "") == parse_index(index, "")


def test_shards_may_be_bounded_by_their_bytes_and_the_parts_named(folder: Path) -> None:
    (folder / "pictures" / "val").rename(folder / "pictures" / "test")

    packed = ngd_data(folder, "pack", "pictures", "out", "--test", "test", "--shard-bytes", "20480")

    assert packed.returncode == 0, packed.stderr
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["test", "train"]
    assert all(path.stat().st_size <= 20480 for path in (folder / "out").rglob("*.tar"))


def test_terminal_is_shown_how_far_each_part_is(folder: Path) -> None:
    packed = on_terminal("data", "pack", str(folder / "pictures"), str(folder / "out"))
    indexed = on_terminal("data", "index", str(folder / "out" / "train"))

    for words in ("train", "8/8 images", "val", "4/4 images", "8 samples of 3 classes in 1 shards"):
        assert words in packed
    assert "1/1 shards" in indexed


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ("pack nowhere out", 1, "ngd: no folder or zip file nowhere\n"),
        ("pack pictures there", 1, "ngd: there exists; give another folder, or remove it\n"),
        (
            "pack pictures out --test test",
            1,
            "ngd: pictures holds no folder 'test', but train, val; name the parts by --train and --test\n",
        ),
        ("pack empty out", 1, "ngd: train/class0/a.jpg is empty; remove it\n"),
        ("pack pictures out --samples-per-shard 3 --shard-bytes 5", 2, "exclude each other; give one of them"),
        ("index pictures", 1, "ngd: pictures holds no *.tar file; give the folder of the shards\n"),
        ("index pictures --classes nowhere", 1, "ngd: can't read the class names in nowhere: "),
    ],
)
def test_bad_input_is_said_in_one_sentence_and_nothing_is_left(
    folder: Path, arguments: str, status: int, words: str
) -> None:
    (folder / "there").mkdir()
    picture_folder(folder / "empty", {"train": 3, "val": 3})
    (folder / "empty" / "train" / "class0" / "a\x1b[31m.jpg").touch()

    refused = ngd_data(folder, *arguments.split())

    assert (refused.returncode, refused.stdout) == (status, "")
    assert words in refused.stderr
    assert status == 2 or refused.stderr.count("\n") == 1
    assert not (folder / "out").exists()
    assert not (folder / "out.partial").exists()
    assert not list(folder.rglob(INDEX_NAME))
