"""Natural gradient for PyTorch, on one rank or thousands. Start at `optimizer.NGD`.

Names load on first use, so that `ngd_dist.config` and `ngd_dist.factors.cost` cost no torch.
"""

from typing import TYPE_CHECKING, Any

from ngd_dist.config import NGDConfig

if TYPE_CHECKING:
    from ngd_dist.optimizer import NGD
    from ngd_dist.sharded_state import ShardedState

__all__ = ["NGD", "NGDConfig", "ShardedState", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "NGD":
        from ngd_dist.optimizer import NGD

        return NGD
    if name == "ShardedState":
        from ngd_dist.sharded_state import ShardedState

        return ShardedState
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
