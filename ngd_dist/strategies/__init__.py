"""How statistics, gradients and directions move between ranks. Start at `base.Strategy`.

A new movement is one file, one config class, and one line here.
"""

import torch

from ngd_dist.comm import Communicator
from ngd_dist.config import NGDConfig
from ngd_dist.errors import ConfigError
from ngd_dist.placement import Placement
from ngd_dist.strategies.all_reduce import AllReduce
from ngd_dist.strategies.base import Collected, Findings, Local, Report, Shapes, Strategy
from ngd_dist.strategies.owner_sharded import OwnerSharded
from ngd_dist.strategies.single import Single

__all__ = ["STRATEGIES", "Collected", "Findings", "Local", "Report", "Shapes", "Strategy", "build_strategy"]

STRATEGIES: dict[str, type[Strategy]] = {
    "single": Single,
    "all_reduce": AllReduce,
    "owner_sharded": OwnerSharded,
}


def build_strategy(
    config: NGDConfig,
    comm: Communicator,
    placement: Placement,
    shapes: Shapes,
    *,
    dtype: torch.dtype,
    device: torch.device,
    is_averaged_by_ddp: bool,
) -> Strategy:
    """Returns the configured movement, or the default for the number of ranks. Raises: ConfigError."""
    sums = config.loss_reduction == "sum"
    if sums and is_averaged_by_ddp:
        raise ConfigError("loss_reduction 'sum' needs the bare model: DDP divides the sum by the number of ranks")
    kind = config.strategy.kind if config.strategy else "single" if comm.world_size == 1 else "owner_sharded"
    if kind == "single" and comm.world_size > 1:
        raise ConfigError(
            f"strategy 'single' needs one process, got a group of {comm.world_size}; "
            "choose all_reduce or owner_sharded, or leave strategy out"
        )
    wire = torch.bfloat16 if config.statistics_wire == "bfloat16" else torch.float32
    return STRATEGIES[kind](
        comm,
        placement,
        shapes,
        dtype=dtype,
        wire_dtype=torch.float64 if dtype == torch.float64 else wire,
        device=device,
        gradient_scale=None if is_averaged_by_ddp else 1.0 if sums else 1 / comm.world_size,
    )
