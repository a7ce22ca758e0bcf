"""Packing images into shards, and indexing shards."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from ngd_workers.contract.errors import DataNotFoundError, InvalidDataError, SpecError, WorkerError
from ngd_workers.shards.index import Index, index_shards, parse_index, write_index
from ngd_workers.shards.pack import pack
from tests.support.picture_files import picture_folder

PARTS = ("train", "val")


def unseen(*_: object) -> None:
    """Shows no progress."""


def images_of(folder: Path, index: Index) -> list[tuple[bytes, int]]:
    return [
        ((folder / shard.name).read_bytes()[offset : offset + length], label)
        for shard in index.shards
        for offset, length, label in zip(shard.offsets, shard.lengths, shard.labels, strict=True)
    ]


def originals(root: Path, part: str) -> list[tuple[bytes, int]]:
    return [(path.read_bytes(), int(path.parent.name[-1])) for path in (root / part).rglob("*.jpg")]


def zipped(root: Path) -> Path:
    path = root.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*.jpg")):
            archive.write(file, file.relative_to(root).as_posix())
    return path


@pytest.mark.parametrize("from_zip", [False, True])
def test_every_image_is_packed_once_and_found_by_the_index(tmp_path: Path, from_zip: bool) -> None:
    root = picture_folder(tmp_path / "pictures", {"train": 23, "val": 7})
    shown: list[tuple[str, int, int]] = []

    indices = pack(
        zipped(root) if from_zip else root,
        tmp_path / "out",
        PARTS,
        lambda *progress: shown.append(progress),
        samples_per_shard=5,
    )

    assert shown[0] == ("train", 0, 23)
    assert shown[-1] == ("val", 7, 7)
    assert [len(shard.labels) for shard in indices["train"].shards] == [5, 5, 5, 5, 3]
    for part in PARTS:
        folder = tmp_path / "out" / part
        assert parse_index((folder / "index.json").read_bytes(), "index") == indices[part]
        assert indices[part].classes == ["class0", "class1", "class2"]
        assert sorted(images_of(folder, indices[part])) == sorted(originals(root, part))
    assert images_of(tmp_path / "out" / "train", indices["train"]) != originals(root, "train")  # mixed


def test_indexing_what_was_packed_gives_the_same_places(tmp_path: Path) -> None:
    root = picture_folder(tmp_path / "pictures", {"train": 9, "val": 3})
    packed = pack(root, tmp_path / "out", PARTS, unseen, samples_per_shard=4)["train"]

    indexed = index_shards(tmp_path / "out" / "train", packed.classes, unseen)

    assert indexed == packed


def test_shards_stay_below_their_bytes(tmp_path: Path) -> None:
    root = picture_folder(tmp_path / "pictures", {"train": 60, "val": 3})

    index = pack(root, tmp_path / "out", PARTS, unseen, shard_bytes=30_000)["train"]

    sizes = [(tmp_path / "out" / "train" / shard.name).stat().st_size for shard in index.shards]
    assert sizes == [shard.bytes for shard in index.shards]
    assert len(sizes) > 2
    assert max(sizes) <= 30_000
    assert index.num_samples == 60


def test_an_image_larger_than_a_shard_has_one_of_its_own(tmp_path: Path) -> None:
    root = picture_folder(tmp_path / "pictures", {"train": 4, "val": 3})

    index = pack(root, tmp_path / "out", PARTS, unseen, shard_bytes=1)["train"]

    assert [len(shard.labels) for shard in index.shards] == [1, 1, 1, 1]


def test_same_images_make_the_same_bytes(tmp_path: Path) -> None:
    root = picture_folder(tmp_path / "pictures", {"train": 9, "val": 3})
    for out in ("first", "second"):
        pack(root, tmp_path / out, PARTS, unseen, samples_per_shard=4)

    for file in sorted((tmp_path / "first").rglob("*.*")):
        assert file.read_bytes() == (tmp_path / "second" / file.relative_to(tmp_path / "first")).read_bytes()


def test_failed_packing_leaves_nothing(tmp_path: Path) -> None:
    root = picture_folder(tmp_path / "pictures", {"train": 9, "val": 3})
    (root / "val" / "class1" / "0001.jpg").write_bytes(b"")

    with pytest.raises(InvalidDataError, match=r"val/class1/0001\.jpg is empty"):
        pack(root, tmp_path / "out", PARTS, unseen, samples_per_shard=4)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures"]


def test_killed_packing_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    root = picture_folder(tmp_path / "pictures", {"train": 9, "val": 3})
    code = f"""
import os, signal
from pathlib import Path
from ngd_workers.shards.pack import pack
def done(part, number, all_of_them):
    if part == "val" and number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
pack(Path({str(root)!r}), Path({str(tmp_path / "out")!r}), ["train", "val"], done, samples_per_shard=4)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL

    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial" / "val" / "index.json").exists()
    with pytest.raises(SpecError, match=r"out\.partial exists: .* killed; remove it"):
        pack(root, tmp_path / "out", PARTS, unseen, samples_per_shard=4)


def test_sources_that_cannot_be_packed_say_why(tmp_path: Path) -> None:
    root = picture_folder(tmp_path / "pictures", {"train": 6, "val": 2})
    (tmp_path / "text").write_text("no zip")
    (tmp_path / "there").mkdir()

    def fails(source: Path, out: str = "out", parts: tuple[str, ...] = PARTS) -> str:
        with pytest.raises(WorkerError) as error:
            pack(source, tmp_path / out, parts, unseen, samples_per_shard=4)
        return str(error.value)

    assert "val has 2: 'class2' is in the first alone" in fails(root)
    assert "holds no folder 'test', but train, val" in fails(root, parts=("train", "test"))
    assert "no folder or zip file" in fails(tmp_path / "nowhere")
    assert "neither a folder nor a whole zip file" in fails(tmp_path / "text")
    assert "exists; give another folder" in fails(root, out="there")


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_foreign_tars_are_indexed(tmp_path: Path) -> None:
    long = "a/" * 70 + "key.with.dots"  # needs a second header
    tar_of(tmp_path / "0.tar", [("x/1.cls", b"7\n"), ("x/1.jpg", b"seven"), ("x/1.json", b"{}")])
    tar_of(
        tmp_path / "1.tar",
        [
            ("2.png", b"three"),
            ("2.cls", b"3"),
            (long.split(".")[0] + ".JPG", b"long"),
            (long.split(".")[0] + ".cls", b"0"),
        ],
    )

    index = index_shards(tmp_path, None, unseen)

    assert images_of(tmp_path, index) == [(b"seven", 7), (b"three", 3), (b"long", 0)]
    assert index.classes is None
    assert index.num_labels == 8
    with pytest.raises(InvalidDataError, match="label 7 has no name among the 2 given classes"):
        index_shards(tmp_path, ["a", "b"], unseen)


def test_labels_may_be_class_names(tmp_path: Path) -> None:
    tar_of(tmp_path / "0.tar", [("1.jpg", b"1"), ("1.cls", b"dog"), ("2.jpg", b"2"), ("2.cls", b"cat")])

    index = index_shards(tmp_path, None, unseen)

    assert index.classes == ["cat", "dog"]
    assert index.shards[0].labels == [1, 0]
    assert index_shards(tmp_path, ["dog", "cat", "cow"], unseen).shards[0].labels == [0, 1]
    with pytest.raises(InvalidDataError, match="the label 'cat' is none of the 1 given classes"):
        index_shards(tmp_path, ["dog"], unseen)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.jpg", b"1")], "sample 1 has no label"),
        ([("1.cls", b"1"), ("2.jpg", b"2"), ("2.cls", b"2")], "sample 1 has no image"),
        ([("1.jpg", b"1"), ("1.png", b"1"), ("1.cls", b"1")], "sample 1 has two images"),
        ([], "holds no sample"),
    ],
)
def test_tars_without_whole_samples_are_refused(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    tar_of(tmp_path / "0.tar", members)

    with pytest.raises(InvalidDataError, match=message):
        index_shards(tmp_path, None, unseen)


def test_cut_compressed_and_missing_tars_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"holds no \*\.tar file"):
        index_shards(tmp_path, None, unseen)

    tar_of(tmp_path / "0.tar", [("1.cls", b"1"), ("1.jpg", bytes(5000))])
    os.truncate(tmp_path / "0.tar", 3000)
    with pytest.raises(InvalidDataError, match=r"0\.tar is (cut|no whole tar file)"):
        index_shards(tmp_path, None, unseen)

    (tmp_path / "0.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    with pytest.raises(InvalidDataError, match=r"0\.tar is no whole tar file"):
        index_shards(tmp_path, None, unseen)


def test_index_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    shard = {"name": "0.tar", "bytes": 4096, "offsets": [512], "lengths": [10], "labels": [1]}

    def message(**changes: object) -> str:
        content = {"format": "ngd-shards", "version": 1, "classes": None, "shards": [shard]} | changes
        with pytest.raises(InvalidDataError) as error:
            parse_index(json.dumps(content).encode(), "here/index.json")
        return str(error.value)

    assert "here/index.json is no index of shards: version" in message(version=2)
    assert "make it with: ngd data index" in message(shards=[])
    assert "equally many" in message(shards=[shard | {"labels": [1, 2]}])
    assert "ends after its 4096 bytes" in message(shards=[shard | {"lengths": [4000]}])
    assert "label 1 has no name: there are 1 classes" in message(classes=["a"])
    assert "should match" in message(shards=[shard | {"name": "../0.tar"}])
    with pytest.raises(InvalidDataError, match="no index of shards"):
        parse_index(b"<html>", "x")
    write_index(Index.model_validate({"shards": [shard]}), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json"]
