"""The tasks of `steps_to_target`: data in memory, a model, and the targets."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ngd_workers.contract.spec import IDX
from ngd_workers.data import load_dataset

__all__ = ["TASKS", "Data", "Task"]


@dataclass(frozen=True, slots=True)
class Data:
    """Images [samples, channels, height, width], float32 and standardised; labels [samples], int64."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True, slots=True)
class Task:
    """One question: steps until `accuracy` on the test set, and until `loss` on the training batches.

    evaluate_every: by batch size, optimizer steps between two evaluations: the resolution of every count.
    """

    load: Callable[[Path], Data]
    model: Callable[[], nn.Module]
    accuracy: float
    loss: float
    evaluate_every: dict[int, int]


def fashion_mnist(data_dir: Path) -> Data:
    """Returns the 60,000 and 10,000 images of <data_dir>/fashion-mnist."""
    dataset = load_dataset(IDX(directory="fashion-mnist", mean=0.286, std=0.353), data_dir)
    return Data(dataset.train_x, dataset.train_y, dataset.test_x, dataset.test_y)


def strided_cnn() -> nn.Module:
    """Returns two strided convolutions and two linear layers, 52 k parameters, for 28x28 in one channel: small enough
    for hundreds of runs on one core. No normalisation: SINGD leaves its parameters untrained.
    """
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=4, padding=2), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


TASKS = {
    "fashion-mnist": Task(fashion_mnist, strided_cnn, accuracy=0.85, loss=0.40, evaluate_every={512: 10, 4096: 4}),
}
