"""Methods that change the model: it trains in other coordinates, and is folded back for whoever uses it.

A transform is one file with a subclass of `Transform`, a settings class, and one entry of `TRANSFORMS`.
"""

import torch.distributed as dist
from torch import nn

from ngd_dist.config import SNGDConfig
from ngd_dist.transforms.base import Transform
from ngd_dist.transforms.sngd import SNGD

__all__ = ["SNGD", "TRANSFORMS", "Transform", "transform_of"]

TRANSFORMS: dict[str, type[Transform]] = {"sngd": SNGD}


def transform_of(model: nn.Module, config: SNGDConfig, *, process_group: dist.ProcessGroup | None = None) -> Transform:
    """Returns the transform of the settings, which has changed the model. Raises: ConfigError."""
    return TRANSFORMS[config.kind](model, config, process_group=process_group)
