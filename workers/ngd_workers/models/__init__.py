"""Models by name. Start at `build_model`.

A new family is a file here, a line in MODELS and a class in contract/spec/models.py. Imports without torch, so that a
name can be checked where torch is not installed.
"""

from typing import TYPE_CHECKING, Any

from ngd_workers.contract.errors import SpecError, UserCodeError
from ngd_workers.contract.spec import ModelChoice, UserModel
from ngd_workers.data import Images
from ngd_workers.functions import call_user, load_function

if TYPE_CHECKING:
    from torch import nn

__all__ = ["MODELS", "build_model", "images"]

MODELS: dict[str, str] = {
    "mlp": "ngd_workers.models.mlp:build",
    "small_cnn": "ngd_workers.models.small_cnn:build",
    "torchvision": "ngd_workers.models.torchvision_model:build",
    "timm": "ngd_workers.models.timm_model:build",
    "transformers": "ngd_workers.models.transformers_model:build",
    "gpt": "ngd_workers.models.gpt:build",
    "encoder_decoder": "ngd_workers.models.encoder_decoder:build",
}


def build_model(choice: ModelChoice, shape: Any) -> "nn.Module":
    """Returns the model for data of this shape, on the CPU, with weights drawn from torch's generator.

    Raises: SpecError, UserCodeError.
    """
    from torch import nn

    if not isinstance(choice, UserModel):
        built = load_function(MODELS[choice.kind])(choice, shape)
    else:
        built = call_user(choice.function, shape, **choice.options)
    if not isinstance(built, nn.Module):
        raise UserCodeError(f"{choice.kind!r} must return a torch.nn.Module, got {type(built).__name__}")
    return built


def images(kind: str, shape: Any) -> Images:
    """Returns the shape if it is that of labelled images. Raises: SpecError that names the model's kind."""
    if not isinstance(shape, Images):
        raise SpecError(f"model {kind} needs labelled images, got data of {shape}; choose another model")
    return shape
