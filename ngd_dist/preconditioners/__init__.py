"""Approximations of a layer's Fisher block. Start at `base.Preconditioner`.

A new method is one file, one config class, and one line here. Layers whose block is small per unit (batch norm)
always take `UnitWise`; `kind` chooses the method of the others.
"""

from collections.abc import Callable
from typing import Any

from ngd_dist.config import KFAC as KFACConfig
from ngd_dist.cost import LayerShape
from ngd_dist.preconditioners.base import Cache, Preconditioner
from ngd_dist.preconditioners.kfac import KFAC
from ngd_dist.preconditioners.unit_wise import UnitWise

__all__ = ["PRECONDITIONERS", "Cache", "Preconditioner", "preconditioner_for"]

PRECONDITIONERS: dict[str, Callable[[LayerShape, Any], Preconditioner]] = {"kfac": KFAC}


def preconditioner_for(shape: LayerShape, config: KFACConfig) -> Preconditioner:
    """Returns the method for one layer: the configured one, or unit-wise where the layer's Fisher block is."""
    return UnitWise(shape) if shape.fisher == "unit_wise" else PRECONDITIONERS[config.kind](shape, config)
