"""The card of a model: the shapes of its layers and other sizes from which costs are counted."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from ngd_dist.config import Settings
from ngd_dist.factors.cost import LayerShape

__all__ = ["LayerCard", "ModelCard"]

MAX_LAYERS = 20_000
Width = Annotated[int, Field(ge=1, le=2**31)]
Count = Annotated[int, Field(ge=0, le=2**53)]


class LayerCard(Settings):
    """A layer that NGD preconditions. Its gradient is [blocks, outputs, inputs], a bias being the last input.

    >>> LayerCard(name="0", inputs=9, outputs=4, positions=1).parameters
    36
    """

    name: str = Field(max_length=500)
    fisher: Literal["kronecker", "unit_wise"] = "kronecker"
    inputs: Width
    outputs: Width
    blocks: Width = 1
    has_one_hot_inputs: bool = False
    positions: Width = Field(description="Rows of one sample: pixels, tokens; 1 if dense.")
    is_stackable: bool = Field(default=False, description="Whether its kind of module shares calls if small.")

    @property
    def shape(self) -> LayerShape:
        """The shape from which the library counts."""
        return LayerShape(self.name, self.fisher, self.inputs, self.outputs, self.blocks, self.has_one_hot_inputs)

    @property
    def parameters(self) -> int:
        """The number of weights, and of the numbers in its gradient."""
        return self.blocks * self.outputs * self.inputs


class ModelCard(Settings):
    """A model as costs are counted from it. Numbers are float32.

    >>> card = ModelCard(layers=[{"name": "0", "inputs": 9, "outputs": 4, "positions": 1}], forward_flops=64)
    >>> card.parameters
    36
    """

    layers: tuple[LayerCard, ...] = Field(max_length=MAX_LAYERS, description="In the order of the model.")
    other_parameters: Count = Field(default=0, description="Trained weights that no layer covers.")
    buffer_bytes: Count = Field(default=0, description="Bytes of buffers, such as running means.")
    activation_bytes: Count = Field(default=0, description="Bytes per sample that forward keeps for backward.")
    forward_flops: Annotated[float, Field(ge=0)] = Field(description="Operations of forward per sample.")
    samples: Count | None = Field(default=None, description="Samples in an epoch of training; None: unknown.")

    @property
    def parameters(self) -> int:
        """The number of trained weights."""
        return self.other_parameters + sum(layer.parameters for layer in self.layers)

    @property
    def by_name(self) -> Mapping[str, LayerCard]:
        """The layers by name."""
        return {layer.name: layer for layer in self.layers}
