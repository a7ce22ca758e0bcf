"""A small convolutional network for grey or colour images from 4x4 up."""

from collections import OrderedDict
from typing import Any

from torch import nn

from ngd_workers.contract.errors import SpecError
from ngd_workers.contract.spec import SmallCNN
from ngd_workers.models import images

__all__ = ["build"]

MIN_SIDE = 4  # two poolings halve each side twice


def build(choice: SmallCNN, shape: Any) -> nn.Module:
    """Returns three 3x3 convolutions with batch norm and ReLU, two poolings, one hidden linear layer."""
    shape = images("small_cnn", shape)
    if min(shape.height, shape.width) < MIN_SIDE:
        raise SpecError(
            f"small_cnn needs images of at least {MIN_SIDE}x{MIN_SIDE}, got {shape.height}x{shape.width}; use mlp"
        )
    narrow, wide = choice.channels, 2 * choice.channels
    features = wide * (shape.height // 4) * (shape.width // 4)
    return nn.Sequential(
        OrderedDict(
            block1=_block(shape.channels, narrow),
            pool1=nn.MaxPool2d(2),
            block2=_block(narrow, wide),
            pool2=nn.MaxPool2d(2),
            block3=_block(wide, wide),
            flatten=nn.Flatten(),
            hidden=nn.Linear(features, choice.hidden),
            relu=nn.ReLU(),
            output=nn.Linear(choice.hidden, shape.classes),
        )
    )


def _block(inputs: int, outputs: int) -> nn.Module:
    # Batch norm subtracts the mean, so a bias before it would have no effect.
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), norm=nn.BatchNorm2d(outputs), relu=nn.ReLU()
        )
    )
