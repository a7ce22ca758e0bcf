"""Model classes of transformers, with random weights."""

from typing import Any

from torch import nn

from ngd_workers.contract.errors import SpecError
from ngd_workers.contract.spec import Transformers
from ngd_workers.contract.spec_problems import did_you_mean
from ngd_workers.data import Images
from ngd_workers.models.named import library, made, unknown

__all__ = ["build"]


def build(choice: Transformers, shape: Any) -> nn.Module:
    """Returns the model for data of this shape. Raises: SpecError."""
    transformers = library("transformers")
    known = [name for name in dir(transformers) if "For" in name or name.endswith("Model")]
    model_class = getattr(transformers, choice.name, None) if choice.name in known else None
    config_class = getattr(model_class, "config_class", None)
    if model_class is None or config_class is None:
        raise unknown("transformers", choice.name, known)
    default = config_class()
    fields = {*default.to_dict(), *default.attribute_map, "num_labels"}
    for name in choice.options:
        if name not in fields:  # it would be stored, and change nothing
            hint = did_you_mean(name, fields) or f"its fields are {', '.join(sorted(fields))}"
            raise SpecError(f"model.options has no field {name!r} for {choice.name} ({hint})")
    sizes = {name: value for name, value in _sizes(shape).items() if hasattr(default, name)}
    return made("transformers", lambda **given: model_class(config_class(**given)), **sizes | choice.options)


def _sizes(shape: Any) -> dict[str, int]:
    """Returns the fields of a configuration that follow from the data."""
    if isinstance(shape, Images):
        sizes = {"num_channels": shape.channels, "num_labels": shape.classes}
        return sizes | ({"image_size": shape.height} if shape.height == shape.width else {})
    if vocabulary := getattr(shape, "vocabulary", None):
        return {"vocab_size": vocabulary}
    return {"num_labels": shape.outputs} if getattr(shape, "outputs", None) else {}
