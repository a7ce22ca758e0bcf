"""torchvision's models of images by name, with random weights: one class for each image, or for each pixel."""

from typing import Any

from torch import Tensor, nn

from ngd_workers.contract.errors import SpecError
from ngd_workers.contract.spec import Torchvision
from ngd_workers.models import images
from ngd_workers.models.named import cifar_stem, library, made, takes_channels, unknown

__all__ = ["build"]


def build(choice: Torchvision, shape: Any) -> nn.Module:
    """Returns the model for the data's channels and classes. Raises: SpecError."""
    shape = images("torchvision", shape)
    models = library("torchvision.models")
    of_pixels = models.list_models(module=models.segmentation)
    known = [*models.list_models(module=models), *of_pixels]
    if choice.name not in known:
        raise unknown("torchvision", choice.name, known)
    options = {"num_classes": shape.classes, **choice.options}
    no_weights: dict[str, None] = {"weights": None}
    if choice.name in of_pixels:
        no_weights["weights_backbone"] = None
        if options.get("aux_loss"):
            raise SpecError("model.options.aux_loss adds an output that no task learns from; leave it out")
    model = made("torchvision", lambda **given: models.get_model(choice.name, **no_weights, **given), **options)
    if choice.name in of_pixels:
        model.register_forward_hook(_out)  # not a module around it: the weights keep torchvision's names
    if choice.stem == "cifar":
        model = cifar_stem(model, choice.name, shape.classes)
    return takes_channels(model, shape.channels)


def _out(model: nn.Module, args: Any, output: dict[str, Tensor]) -> Tensor:
    """Returns the logits [N, classes, height, width] in the dictionary that a model of pixels returns."""
    return output["out"]
