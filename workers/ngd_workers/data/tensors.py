"""Data held in memory as tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ngd_workers.contract.errors import InvalidDataError
from ngd_workers.data.base import Dataset, Images

__all__ = ["TensorPart", "image_tensors"]


class TensorPart:
    """Samples (x[i], y[i])."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]

    def batch_of(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns the samples of these numbers as one batch."""
        chosen = torch.as_tensor(indices)
        return self.x[chosen], self.y[chosen]


def image_tensors(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, shape: Images) -> Dataset:
    """Returns images in memory: x float32 [samples, channels, height, width], y int64 [samples] in [0, classes).

    Raises: InvalidDataError.
    """
    _check("train", train_x, train_y, shape)
    _check("test", test_x, test_y, shape)
    return Dataset(TensorPart(train_x, train_y), TensorPart(test_x, test_y), shape)


def _check(part: str, x: Tensor, y: Tensor, shape: Images) -> None:
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
