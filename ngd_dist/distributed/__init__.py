"""The movement of statistics, gradients, inverses and directions between ranks. Start at `sync.Sync`.

`NGDConfig.strategy` chooses the roles of the ranks (`placement`); the movement is the same code for all strategies.
"""

from collections.abc import Mapping, Sequence

import torch

from ngd_dist.config import AllReduce, NGDConfig, OwnerSharded, Single
from ngd_dist.cost.placement import strategy_of
from ngd_dist.distributed.base import GlobalMeans, LayerLayout, LocalContribution, RefreshReport, StepResult
from ngd_dist.distributed.comm import Communicator
from ngd_dist.distributed.pieces import LayerParts, Pieces, Range, shares_of_layers
from ngd_dist.distributed.placement import Roles, place
from ngd_dist.distributed.sync import Sync
from ngd_dist.engines import Engine
from ngd_dist.errors import ConfigError

__all__ = [
    "GlobalMeans",
    "LayerLayout",
    "LayerParts",
    "LocalContribution",
    "RefreshReport",
    "StepResult",
    "Sync",
    "build_sync",
]

MB = 2**20


def build_sync(
    config: NGDConfig,
    comm: Communicator,
    costs: Mapping[str, int],
    layouts: Mapping[str, LayerLayout],
    *,
    dtype: torch.dtype,
    device: torch.device,
    engine: Engine,
    fixed: Mapping[str, Roles],
    parts: Mapping[str, LayerParts] | None = None,
    ranges: Sequence[Mapping[str, Range]] = (),
) -> Sync:
    """Collective. Returns the movement of the configured strategy, or of the default one. Raises: ConfigError.

    costs: the operations of refreshing each layer. fixed: the roles of the layers that keep them. parts, ranges: the
    parameters of each layer and, by rank, the ranges of its pieces, for an engine that is sharded.
    """
    sums = config.loss_reduction == "sum"
    engine.check_reduction(config.loss_reduction)
    choice = strategy_of(config, comm.world_size)
    if isinstance(choice, Single) and comm.world_size > 1:
        raise ConfigError(
            f"strategy 'single' needs one process, got a group of {comm.world_size}; "
            "choose all_reduce or owner_sharded, or leave strategy out"
        )
    placement = place(
        costs,
        comm.world_size,
        fraction=choice.fraction if isinstance(choice, OwnerSharded) else 0.0,
        replicate_below=choice.replicate_below if isinstance(choice, OwnerSharded) else 0,
        everyone_inverts=isinstance(choice, AllReduce),
        fixed=fixed,
        shares={} if parts is None else shares_of_layers(parts, ranges),
        local=[name for name, layout in layouts.items() if layout.is_local],
    )
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    return Sync(
        comm,
        placement,
        layouts,
        kind=choice.kind,
        dtype=dtype,
        exact=exact,
        wire=exact if exact == torch.float64 else getattr(torch, config.statistics_wire),
        kept=None if config.inverse_dtype == "float32" else getattr(torch, config.inverse_dtype),
        device=device,
        gradient_scale=None if engine.averages_gradients else 1.0 if sums else 1 / comm.world_size,
        bucket_bytes=config.bucket_mb * MB,
        pieces=None if parts is None else Pieces(comm, placement, parts, ranges, dtype=dtype, device=device),
    )
