"""Natural gradient for PyTorch, on one rank or thousands. Start at `optimizer.NGD`.

Names load on first use, so that `ngd_dist.config` and `ngd_dist.factors.cost` cost no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ngd_dist.config import NGDConfig

if TYPE_CHECKING:
    from ngd_dist.capture.part import part_of
    from ngd_dist.optimizer import NGD
    from ngd_dist.preconditioner import Preconditioner
    from ngd_dist.sharded_state import ShardedState

__all__ = ["NGD", "NGDConfig", "Preconditioner", "ShardedState", "__version__", "part_of"]

__version__ = "0.1.0"


_HOMES = {
    "NGD": "ngd_dist.optimizer",
    "Preconditioner": "ngd_dist.preconditioner",
    "ShardedState": "ngd_dist.sharded_state",
    "part_of": "ngd_dist.capture.part",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ModuleNotFoundError(
            f"ngd_dist.{name} needs torch, which ngd-dist alone does not bring: pip install 'ngd-dist[train]'",
            name="torch",
        ) from None
