"""scikit-learn's handwritten digits: 1,797 grey images of 8x8 that ship with the package."""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from ngd_workers.contract.errors import SpecError
from ngd_workers.contract.spec import Digits
from ngd_workers.data.base import Dataset, Images
from ngd_workers.data.tensors import image_tensors

__all__ = ["load"]

PIXEL_MAX = 16.0
SPLIT_SEED = 0


def load(choice: Digits, data_dir: Path | None) -> Dataset:
    """Returns pixels in [0, 1], split so that both parts have the same share of every class. `data_dir` is not used."""
    pixels, labels = load_digits(return_X_y=True)
    try:
        train_x, test_x, train_y, test_y = train_test_split(
            pixels, labels, test_size=choice.test_fraction, stratify=labels, random_state=SPLIT_SEED
        )
    except ValueError as error:
        raise SpecError(f"data.test_fraction {choice.test_fraction} leaves a class or a part empty: {error}") from error
    return image_tensors(
        train_x=_images(train_x),
        train_y=torch.as_tensor(train_y, dtype=torch.int64),
        test_x=_images(test_x),
        test_y=torch.as_tensor(test_y, dtype=torch.int64),
        shape=Images(channels=1, height=8, width=8, classes=10),
    )


def _images(pixels: object) -> torch.Tensor:
    return torch.as_tensor(pixels, dtype=torch.float32).div(PIXEL_MAX).reshape(-1, 1, 8, 8)
