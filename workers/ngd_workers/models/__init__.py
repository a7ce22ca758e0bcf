"""Models by name. Start at `build_model`. A new family is a file, a line in MODELS and a class in contract/spec.py.

Imports without torch, so that a name can be checked where torch is not installed.
"""

from typing import TYPE_CHECKING

from ngd_workers.contract.errors import UserCodeError
from ngd_workers.contract.spec import MLP, SmallCNN, UserModel
from ngd_workers.data import Shape
from ngd_workers.functions import call_user, load_function

if TYPE_CHECKING:
    from torch import nn

__all__ = ["MODELS", "build_model"]

MODELS: dict[str, str] = {
    "mlp": "ngd_workers.models.mlp:build",
    "small_cnn": "ngd_workers.models.small_cnn:build",
}


def build_model(choice: SmallCNN | MLP | UserModel, shape: Shape) -> "nn.Module":
    """Returns the model on the CPU, with weights drawn from torch's generator. Raises: UserCodeError."""
    from torch import nn

    if not isinstance(choice, UserModel):
        built = load_function(MODELS[choice.kind])(choice, shape)
    else:
        built = call_user(choice.function, shape, **choice.options)
    if not isinstance(built, nn.Module):
        raise UserCodeError(f"{choice.kind!r} must return a torch.nn.Module, got {type(built).__name__}")
    return built
