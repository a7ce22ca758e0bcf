"""Linear layers with ReLU between them."""

from itertools import pairwise
from typing import Any

from torch import nn

from ngd_workers.contract.spec import MLP
from ngd_workers.data import Vectors
from ngd_workers.models import images

__all__ = ["build"]


def build(choice: MLP, shape: Any) -> nn.Module:
    """Returns flatten, then a linear layer and a ReLU for each hidden width, then the linear layer to the outputs."""
    if not isinstance(shape, Vectors):
        shape = images("mlp", shape)
    inputs = shape.width if isinstance(shape, Vectors) else shape.channels * shape.height * shape.width
    widths = [inputs, *choice.hidden]
    hidden = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(widths[-1], shape.outputs))
