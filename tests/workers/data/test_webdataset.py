"""Shards on a disk: samples, and shards that are not the indexed ones."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ngd_workers.contract.errors import DataNotFoundError, InvalidDataError, WorkerError
from ngd_workers.contract.spec import ImageFolder, WebDataset
from ngd_workers.data import Dataset, Images, Shards, load_dataset
from ngd_workers.data import storage as storage_module
from ngd_workers.shards.pack import pack
from tests.support.picture_files import picture_folder

IMAGES = {"size": 8, "augment": {"kind": "none"}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    pictures = picture_folder(tmp_path / "pictures", {"train": 20, "val": 5})
    pack(pictures, tmp_path / "shards", ["train", "val"], lambda *_: None, samples_per_shard=6)
    return tmp_path / "shards"


def load(root: Path, **options: object) -> Dataset:
    content = {"directory": root.name, "images": IMAGES} | options
    return load_dataset(WebDataset.model_validate(content), root.parent)


def test_samples_are_those_of_the_folder(root: Path) -> None:
    dataset = load(root, lanes=2, window=3)
    pictures = ImageFolder.model_validate({"directory": str(root.parent / "pictures"), "images": IMAGES})
    folder = load_dataset(pictures, None)

    def sorted_samples(part: object) -> list[tuple[int, bytes]]:
        samples = (part[index] for index in range(len(part)))  # type: ignore[index,arg-type]
        return sorted((label, image.numpy().tobytes()) for image, label in samples)

    assert dataset.shape == Images(3, 8, 8, 3)
    assert dataset.shards == Shards((6, 6, 6, 2), lanes=2, window=3)
    assert sorted_samples(dataset.train) == sorted_samples(folder.train)
    assert sorted_samples(dataset.test) == sorted_samples(folder.test)


def test_few_files_are_open_at_once_and_none_after_pickling(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "MOST_OPEN_FILES", 2)
    part = load(root).train
    before = len(os.listdir("/proc/self/fd"))

    pixels = [part[index][0] for index in range(20)]  # type: ignore[index]
    again = pickle.loads(pickle.dumps(part))

    assert len(os.listdir("/proc/self/fd")) - before <= 2
    assert all(torch.equal(again[index][0], pixels[index]) for index in reversed(range(20)))
    del part, again
    assert len(os.listdir("/proc/self/fd")) <= before


def fails_at(part: object, index: int) -> str:
    with pytest.raises(WorkerError) as error:
        part[index]  # type: ignore[index]
    return f"{type(error.value).__name__}: {error.value}"


def test_cut_tar_is_named(root: Path) -> None:
    os.truncate(root / "train" / "shard-000001.tar", 4096)

    part = load(root).train

    assert part[5][1] in range(3)  # type: ignore[index]
    message = fails_at(part, 6)
    assert message.startswith("InvalidDataError: sample 6, ")
    assert "train/shard-000001.tar: the file has 4096 bytes and its index says" in message


def test_index_of_another_tar_is_named(root: Path) -> None:
    train = root / "train"
    size = (train / "shard-000000.tar").stat().st_size
    content = (train / "shard-000002.tar").read_bytes().ljust(size, b"\0")[:size]
    (train / "shard-000000.tar").write_bytes(content[:512] + content[1024:] + bytes(512))

    message = fails_at(load(root).train, 3)

    assert "InvalidDataError: sample 3, " in message
    assert "shard-000000.tar" in message
    assert "the index is another tar's; index it by: ngd data index" in message


def test_bad_image_names_shard_and_member(root: Path) -> None:
    index = load(root).train._files  # type: ignore[union-attr]
    path = root / "train" / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    begin = int(index._offsets[2])
    content[begin : begin + 20] = bytes(20)
    path.write_bytes(content)

    message = fails_at(load(root).train, 2)

    assert "sample 2, " in message
    assert "shard-000000.tar (00000002_" in message
    assert "no image format that Pillow knows" in message


def test_missing_pieces_are_named(root: Path) -> None:
    (root / "train" / "shard-000000.tar").unlink()
    assert "DataNotFoundError: can't read" in fails_at(load(root).train, 0)

    (root / "val" / "index.json").unlink()
    with pytest.raises(DataNotFoundError, match=r"val/index\.json: No such file"):
        load(root)
    shutil.rmtree(root)
    with pytest.raises(DataNotFoundError, match="set NGD_DATA_DIR"):
        load(root)


def test_parts_with_other_classes_are_refused(root: Path) -> None:
    path = root / "val" / "index.json"
    path.write_text(path.read_text().replace("class2", "class7"))

    with pytest.raises(InvalidDataError, match="'class2' is in the first alone"):
        load(root)


def test_a_local_directory_takes_no_cache(root: Path) -> None:
    with pytest.raises(ValueError, match="cache is for a directory with a URL"):
        load(root, cache={"directory": "/tmp/x", "bytes": 1})
    with pytest.raises(ValueError, match="storage_options is for a directory with a URL"):
        load(root, storage_options={"anon": True})
    with pytest.raises(ValueError, match="absolute path"):
        load(root, directory="s3://x", cache={"directory": "x", "bytes": 1})


def test_numbers_may_be_of_numpy(root: Path) -> None:
    assert load(root).train[np.int64(19)][0].shape == (3, 8, 8)  # type: ignore[index]
