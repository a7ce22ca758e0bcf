"""Models of other libraries by their names: what torchvision's, timm's and transformers' builders share."""

import importlib
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ngd_workers.contract.errors import SpecError
from ngd_workers.contract.spec_problems import did_you_mean

__all__ = ["cifar_stem", "library", "made", "takes_channels", "unknown"]


def library(name: str) -> Any:
    """Returns the imported library. Raises: SpecError that names the extra that brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SpecError(
            f"model {name} needs the library {name}: {error}; install ngd-workers[models] where the workers run"
        ) from error


def unknown(kind: str, name: str, known: Iterable[str]) -> SpecError:
    """Returns the error for a name that the library does not know."""
    known = list(known)
    hint = did_you_mean(name, known) or f"it has {len(known)}, such as {', '.join(known[:3])}"
    return SpecError(f"model.name must be one of the models of {kind}, got {name!r} ({hint})")


def made(kind: str, function: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """Returns the model that the library's function makes. Raises: SpecError in place of its errors."""
    for weights in ("weights", "weights_backbone", "pretrained", "checkpoint_path"):
        if options.get(weights):
            raise SpecError(f"model.options.{weights} would load weights; leave it out, and give a file by init_from")
    try:
        return function(**options)
    except Exception as error:  # a library may raise anything for options that don't fit
        raise SpecError(
            f"{kind} can't make the model with {options}: {type(error).__name__}: {error}; check model.options"
        ) from error


def takes_channels(model: nn.Module, channels: int) -> nn.Module:
    """Returns the model with its first convolution, made for RGB, replaced by one for this number of channels."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            if module.in_channels != channels:
                model.set_submodule(name, _like(module, in_channels=channels))
            return model
    raise SpecError(f"the model has no convolution that takes {channels} channels; make the images RGB")


def cifar_stem(model: nn.Module, name: str, classes: int) -> nn.Module:
    """Returns the ResNet or VGG, changed for images of about 32x32. Raises: SpecError for another model."""
    conv, pool = getattr(model, "conv1", None), getattr(model, "maxpool", None)
    features, classifier = getattr(model, "features", None), getattr(model, "classifier", None)
    if isinstance(conv, nn.Conv2d) and isinstance(pool, nn.Module):
        model.conv1 = _like(conv, kernel_size=3, stride=1, padding=1)
        model.maxpool = nn.Identity()
    elif name.startswith("vgg") and isinstance(features, nn.Module) and isinstance(classifier, nn.Module):
        width = [module.out_channels for module in features.modules() if isinstance(module, nn.Conv2d)][-1]
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier = nn.Linear(width, classes)
        nn.init.normal_(model.classifier.weight, std=0.01)  # as torchvision's
        nn.init.zeros_(model.classifier.bias)
    else:
        raise SpecError(f"model.stem cifar is for ResNets and VGGs, got {name!r}; leave it out")
    return model


def _like(conv: nn.Conv2d, **changes: Any) -> nn.Conv2d:
    """Returns a convolution as the given one, but for the changes, with weights drawn as those of ResNets are."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    settings = {name: getattr(conv, name) for name in names} | {"bias": conv.bias is not None} | changes
    new = nn.Conv2d(**settings)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    return new
