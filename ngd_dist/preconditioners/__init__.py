"""Approximations of a layer's Fisher block. Start at `base.Preconditioner`.

A new method is one file, one config class, and one line here. Two kinds of layer have a block of their own whatever
`kind` says: normalisation takes `UnitWise`, and one-hot inputs (embeddings) K-FAC with a diagonal A.
"""

from collections.abc import Callable
from typing import Any

from ngd_dist.config import KFAC as KFACConfig
from ngd_dist.config import NGDConfig
from ngd_dist.errors import ConfigError
from ngd_dist.factors.cost import LayerShape
from ngd_dist.preconditioners.base import Cache, Preconditioner, Refreshed
from ngd_dist.preconditioners.ekfac import EKFAC
from ngd_dist.preconditioners.kfac import KFAC
from ngd_dist.preconditioners.lngd import LNGD
from ngd_dist.preconditioners.unit_wise import UnitWise

__all__ = ["PRECONDITIONERS", "Cache", "Preconditioner", "Refreshed", "check_rows", "preconditioner_for"]

PRECONDITIONERS: dict[str, Callable[[LayerShape, Any, int], Preconditioner]] = {
    "kfac": KFAC,
    "ekfac": EKFAC,
    "lngd": LNGD,
}


def preconditioner_for(shape: LayerShape, config: NGDConfig) -> Preconditioner:
    """Returns the method for one layer: the configured one, unless the layer's Fisher block asks for its own."""
    if shape.fisher == "unit_wise":
        return UnitWise(shape)
    chosen = config.preconditioner
    if shape.has_one_hot_inputs and not isinstance(chosen, KFACConfig):
        chosen = KFACConfig()
    return PRECONDITIONERS[chosen.kind](shape, chosen, config.max_dense)


def check_rows(config: NGDConfig, replicates: int) -> None:
    """Returns if each micro-batch of each rank, `replicates` in all, has rows to give. Raises: ConfigError."""
    rows = config.preconditioner.rows if isinstance(config.preconditioner, KFACConfig) else None
    if rows is not None and rows < replicates:
        raise ConfigError(
            f"rows must be at least {replicates}, one for each micro-batch of each rank, got {rows}; raise it"
        )
