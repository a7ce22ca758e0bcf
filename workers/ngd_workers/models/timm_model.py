"""timm's models of images by name, with random weights."""

from typing import Any

from torch import nn

from ngd_workers.contract.spec import Timm
from ngd_workers.models import images
from ngd_workers.models.named import cifar_stem, library, made, unknown

__all__ = ["build"]


def build(choice: Timm, shape: Any) -> nn.Module:
    """Returns the model for the data's channels and classes. Raises: SpecError."""
    shape = images("timm", shape)
    timm = library("timm")
    if not timm.is_model(choice.name):
        raise unknown("timm", choice.name, timm.list_models())
    sizes = {"num_classes": shape.classes, "in_chans": shape.channels}
    model = made("timm", lambda **given: timm.create_model(choice.name, **given), **sizes | choice.options)
    return cifar_stem(model, choice.name, shape.classes) if choice.stem == "cifar" else model
