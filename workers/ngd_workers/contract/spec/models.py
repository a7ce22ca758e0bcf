"""The models that a job may train."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ngd_workers.contract.spec.base import Function, Options, SpecModel

__all__ = ["MLP", "ModelChoice", "SmallCNN", "UserModel"]


class SmallCNN(SpecModel):
    """Three 3x3 convolutions with batch norm and ReLU, two poolings and one hidden linear layer."""

    kind: Literal["small_cnn"] = "small_cnn"
    channels: int = Field(
        default=16, ge=1, le=1024, description="Channels of the first convolution; the other two have twice as many."
    )
    hidden: int = Field(default=64, ge=1, le=16384, description="Units of the hidden linear layer.")


class MLP(SpecModel):
    """Linear layers with ReLU between them."""

    kind: Literal["mlp"] = "mlp"
    hidden: Annotated[
        tuple[Annotated[int, Field(ge=1, le=65536)], ...],
        BeforeValidator(lambda given: tuple(given) if isinstance(given, list) else given),  # YAML has no tuples
        Field(description="Units of each hidden layer, in order."),
    ] = (128,)


class UserModel(SpecModel):
    """The user's own `package.module:function`, called with the data's shape; it must return a `torch.nn.Module`."""

    kind: Literal["function"] = "function"
    function: Function
    options: Options = Field(default={})


ModelChoice = Annotated[SmallCNN | MLP | UserModel, Field(discriminator="kind")]
