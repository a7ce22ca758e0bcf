"""The four IDX files of MNIST and its relatives, plain or gzipped."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from ngd_workers.contract.errors import DataNotFoundError, InvalidDataError
from ngd_workers.contract.spec import IDX
from ngd_workers.data.base import Dataset, Images
from ngd_workers.data.folder import find_folder
from ngd_workers.data.tensors import image_tensors

__all__ = ["load", "read_idx"]

PIXEL_MAX = 255.0
UNSIGNED_BYTE = 0x08


def load(choice: IDX, data_dir: Path | None) -> Dataset:
    """Returns (pixel / 255 - mean) / std. Raises: DataNotFoundError, InvalidDataError."""
    folder = find_folder(choice.directory, data_dir)
    train_x, train_y = _part(folder, "train", choice)
    test_x, test_y = _part(folder, "t10k", choice)
    _, channels, height, width = train_x.shape
    classes = int(train_y.max()) + 1
    return image_tensors(train_x, train_y, test_x, test_y, Images(channels, height, width, classes))


def read_idx(path: Path, dims: int) -> Tensor:
    """Returns the file's unsigned bytes as a uint8 tensor of `dims` dimensions. Raises: InvalidDataError."""
    content = path.read_bytes()
    try:
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InvalidDataError(f"{path} is not a whole gzip file: {error}; get it again") from error
    header = 4 + 4 * dims
    if len(content) < header or content[:4] != bytes((0, 0, UNSIGNED_BYTE, dims)):
        raise InvalidDataError(
            f"{path} must start with the IDX magic 0000{UNSIGNED_BYTE:02x}{dims:02x} and {dims} sizes, "
            f"got {content[:4].hex() or 'an empty file'}; is it another file?"
        )
    sizes = struct.unpack(f">{dims}I", content[4:header])
    if len(content) - header != math.prod(sizes):
        raise InvalidDataError(
            f"{path} must hold {math.prod(sizes)} bytes for {sizes}, got {len(content) - header}; get it again"
        )
    if math.prod(sizes) == 0:
        raise InvalidDataError(f"{path} is empty: its sizes are {sizes}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).reshape(sizes)


def _part(folder: Path, prefix: str, choice: IDX) -> tuple[Tensor, Tensor]:
    images = read_idx(_file(folder, f"{prefix}-images-idx3-ubyte"), dims=3)
    labels = read_idx(_file(folder, f"{prefix}-labels-idx1-ubyte"), dims=1)
    if len(images) != len(labels):
        raise InvalidDataError(
            f"{folder}: {prefix} has {len(images)} images but {len(labels)} labels; get the files again"
        )
    x = images.unsqueeze(1).to(torch.float32).div_(PIXEL_MAX).sub_(choice.mean).div_(choice.std)
    return x, labels.to(torch.int64)


def _file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataNotFoundError(f"{folder} holds neither {name} nor {name}.gz; get the data set's four files")
