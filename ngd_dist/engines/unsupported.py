"""Refuses models that an engine drives of which the optimizer was not told, or one that is not supported."""

from collections.abc import Sequence

from torch import nn

from ngd_dist.engines.engine import Engine
from ngd_dist.errors import ConfigError

__all__ = ["check_owners"]

UNSUPPORTED = {"FullyShardedDataParallel": "take fully_shard, which is its successor"}


def check_owners(model: nn.Module, driving: Engine, engines: Sequence[Engine]) -> None:
    """Returns if no engine but the one that is `driving` owns the model or its parameters. Raises: ConfigError."""
    for module in model.modules():
        if (way_out := UNSUPPORTED.get(type(module).__name__)) is not None:
            raise ConfigError(f"NGD does not support {type(module).__name__}: {way_out}")
    others = [engine for engine in engines if type(engine) is not type(driving)]
    for name, p in model.named_parameters():
        for engine in others:
            if (way_out := engine.owned(p)) is not None:
                raise ConfigError(f"NGD can't update {name!r} by itself: {way_out}")
