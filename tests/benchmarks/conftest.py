import pytest
import torch
from torch import nn

from benchmarks import models


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 8),
        nn.ReLU(),
        nn.Linear(8, 10),
    )


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> str:
    """Returns the name of a model that benchmarks build in milliseconds, on digits of 8 x 8 pixels."""
    monkeypatch.setitem(models.BUILDERS, "tiny", tiny)
    monkeypatch.setitem(models.SIDES, "tiny", 8)
    return "tiny"
