"""The smallest task that the benchmarks' searches can train: two points, one for each class."""

import torch
from torch import nn

from benchmarks.methods.search import Range
from benchmarks.methods.tasks import Data, Task

__all__ = ["CLUSTERS", "two_clusters"]


def two_clusters() -> Data:
    y = torch.arange(64) % 2
    x = nn.functional.one_hot(y, 4).float()
    return Data(x, y, x, y)


CLUSTERS = Task(
    "two clusters", lambda _: two_clusters(), lambda: nn.Linear(4, 2), 32, "training loss", 0.1, 2, Range(5, 40), 10
)
