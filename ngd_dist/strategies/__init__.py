"""How statistics, gradients and directions move between ranks. Start at `base.Strategy`.

A new movement is one file, one config class, and one line here.
"""

from ngd_dist.strategies.all_reduce import AllReduce
from ngd_dist.strategies.base import Collected, Local, Report, Strategy
from ngd_dist.strategies.owner_sharded import OwnerSharded
from ngd_dist.strategies.single import Single

__all__ = ["STRATEGIES", "Collected", "Local", "Report", "Strategy"]

STRATEGIES: dict[str, type[Strategy]] = {
    "single": Single,
    "all_reduce": AllReduce,
    "owner_sharded": OwnerSharded,
}
