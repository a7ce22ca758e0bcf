"""Data by name. Start at `load_dataset`. A new format is a file, a line in FORMATS and a class in contract/spec.py.

Imports without torch, so that a name can be checked where torch is not installed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ngd_workers.contract.errors import InvalidDataError, UserCodeError
from ngd_workers.contract.spec import IDX, Digits, UserData
from ngd_workers.functions import call_user, load_function

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FORMATS", "Dataset", "Shape", "load_dataset"]

FORMATS: dict[str, str] = {
    "digits": "ngd_workers.data.digits:load",
    "idx": "ngd_workers.data.idx:load",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of the data, for a model: images [channels, height, width] in `classes` classes."""

    channels: int
    height: int
    width: int
    classes: int


@dataclass(frozen=True, slots=True)
class Dataset:
    """A whole data set in memory: x float32 [samples, channels, height, width], y int64 [samples] in [0, classes)."""

    train_x: "Tensor"
    train_y: "Tensor"
    test_x: "Tensor"
    test_y: "Tensor"
    shape: Shape


def load_dataset(choice: Digits | IDX | UserData, data_dir: Path | None) -> Dataset:
    """Returns the data on the CPU, the same on every rank. Raises: one of the WorkerErrors about data."""
    if not isinstance(choice, UserData):
        dataset: Dataset = load_function(FORMATS[choice.kind])(choice, data_dir)
    else:
        dataset = call_user(choice.function, **choice.options)
        if not isinstance(dataset, Dataset):
            raise UserCodeError(
                f"{choice.function!r} must return a ngd_workers.data.Dataset, got {type(dataset).__name__}"
            )
    _check_part("train", dataset.train_x, dataset.train_y, dataset.shape)
    _check_part("test", dataset.test_x, dataset.test_y, dataset.shape)
    return dataset


def _check_part(part: str, x: "Tensor", y: "Tensor", shape: Shape) -> None:
    import torch

    wanted = (len(y), shape.channels, shape.height, shape.width)
    if x.dtype != torch.float32 or tuple(x.shape) != wanted:
        raise InvalidDataError(f"{part}_x must be float32 {wanted} to fit {part}_y, got {x.dtype} {tuple(x.shape)}")
    if y.dtype != torch.int64 or y.ndim != 1 or len(y) == 0:
        raise InvalidDataError(
            f"{part}_y must be int64 with one dimension and not empty, got {y.dtype} {tuple(y.shape)}"
        )
    lowest, highest = int(y.min()), int(y.max())
    if lowest < 0 or highest >= shape.classes:
        raise InvalidDataError(
            f"labels of {part}_y must be in [0, {shape.classes}), got {lowest} to {highest}; check shape.classes"
        )
