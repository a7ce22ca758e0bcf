"""The shape of a layer, from which every cost is counted. Imports without torch."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["LayerShape"]


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The gradient matrix of a layer is [outputs, inputs]; a bias is the last input column.

    `fisher` says which block of the Fisher the layer has: Kronecker-factored, or one small block per unit.
    """

    name: str
    fisher: Literal["kronecker", "unit_wise"]
    inputs: int
    outputs: int
