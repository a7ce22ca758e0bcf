"""torchvision's models of images by name, with random weights."""

from typing import Any

from torch import nn

from ngd_workers.contract.spec import Torchvision
from ngd_workers.models import images
from ngd_workers.models.named import cifar_stem, library, made, takes_channels, unknown

__all__ = ["build"]


def build(choice: Torchvision, shape: Any) -> nn.Module:
    """Returns the model for the data's channels and classes. Raises: SpecError."""
    shape = images("torchvision", shape)
    models = library("torchvision.models")
    known = models.list_models(module=models)
    if choice.name not in known:
        raise unknown("torchvision", choice.name, known)
    options = {"num_classes": shape.classes, **choice.options}
    model = made("torchvision", lambda **given: models.get_model(choice.name, weights=None, **given), **options)
    if choice.stem == "cifar":
        model = cifar_stem(model, choice.name, shape.classes)
    return takes_channels(model, shape.channels)
