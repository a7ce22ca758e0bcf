"""What one layer costs, counted from its shape alone. Imports without torch: the service plans with it too."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Cost", "LayerShape"]


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The gradient matrix of a layer is [outputs, inputs]; a bias is the last input column.

    `fisher` says which block of the Fisher the layer has: Kronecker-factored, or one small block per unit.
    """

    name: str
    fisher: Literal["kronecker", "unit_wise"]
    inputs: int
    outputs: int


@dataclass(frozen=True, slots=True)
class Cost:
    """Counts for one layer: floating-point operations, and numbers (not bytes) kept or sent."""

    refresh_flops: int
    apply_flops: int
    statistic_numbers: int
    cache_numbers: int
