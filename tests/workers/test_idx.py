import gzip
import struct
from pathlib import Path

import pytest
import torch

from ngd_workers.contract.errors import DataNotFoundError, InvalidDataError
from ngd_workers.contract.spec import IDX
from ngd_workers.data import load_dataset
from ngd_workers.data.idx import read_idx

IMAGES = torch.arange(4 * 3 * 2, dtype=torch.uint8).reshape(4, 3, 2)
LABELS = torch.tensor([0, 2, 1, 2], dtype=torch.uint8)


def idx_bytes(tensor: torch.Tensor) -> bytes:
    header = bytes((0, 0, 8, tensor.ndim)) + struct.pack(f">{tensor.ndim}I", *tensor.shape)
    return header + tensor.numpy().tobytes()


def write(path: Path, content: bytes, *, compressed: bool) -> None:
    path = path.with_name(path.name + ".gz") if compressed else path
    path.write_bytes(gzip.compress(content) if compressed else content)


def write_folder(folder: Path, *, compressed: bool = False, labels: torch.Tensor = LABELS) -> None:
    folder.mkdir()
    for part in ("train", "t10k"):
        write(folder / f"{part}-images-idx3-ubyte", idx_bytes(IMAGES), compressed=compressed)
        write(folder / f"{part}-labels-idx1-ubyte", idx_bytes(labels), compressed=compressed)


@pytest.mark.parametrize("compressed", [False, True])
def test_four_files_make_a_scaled_dataset(tmp_path, compressed):
    write_folder(tmp_path / "mnist", compressed=compressed)

    dataset = load_dataset(IDX(directory="mnist", mean=0.5, std=0.25), tmp_path)

    assert (dataset.shape.height, dataset.shape.width, dataset.shape.classes) == (3, 2, 3)
    torch.testing.assert_close(dataset.train.x, (IMAGES.unsqueeze(1) / 255 - 0.5) / 0.25)
    assert dataset.test.y.tolist() == LABELS.tolist()


def test_missing_folder_names_the_path_and_the_settings(tmp_path):
    with pytest.raises(DataNotFoundError, match=rf"{tmp_path}/absent .*NGD_DATA_DIR or --data-dir"):
        load_dataset(IDX(directory="absent"), tmp_path)


def test_missing_file_is_named(tmp_path):
    write_folder(tmp_path / "mnist")
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte").unlink()

    with pytest.raises(DataNotFoundError, match="neither t10k-labels-idx1-ubyte nor"):
        load_dataset(IDX(directory="mnist"), tmp_path)


def test_more_images_than_labels_are_refused(tmp_path):
    write_folder(tmp_path / "mnist", labels=LABELS[:3])

    with pytest.raises(InvalidDataError, match="4 images but 3 labels"):
        load_dataset(IDX(directory="mnist"), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx_bytes(IMAGES)[:-1], "must hold 24 bytes.*got 23"),
        (idx_bytes(IMAGES) + b"x", "must hold 24 bytes.*got 25"),
        (idx_bytes(LABELS), "magic 00000803.*got 00000801"),
        (b"", "got an empty file"),
        (idx_bytes(IMAGES[:0]), "is empty"),
    ],
    ids=["truncated", "too long", "wrong magic", "empty", "no images"],
)
def test_damaged_file_is_refused(tmp_path, content, message):
    (tmp_path / "images").write_bytes(content)

    with pytest.raises(InvalidDataError, match=message):
        read_idx(tmp_path / "images", dims=3)


@pytest.mark.parametrize("damage", [lambda content: content[:-12], lambda content: b"no gzip" + content])
def test_damaged_gzip_is_refused(tmp_path, damage):
    (tmp_path / "images.gz").write_bytes(damage(gzip.compress(idx_bytes(IMAGES))))

    with pytest.raises(InvalidDataError, match="not a whole gzip file"):
        read_idx(tmp_path / "images.gz", dims=3)
