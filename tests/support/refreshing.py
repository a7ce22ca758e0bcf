"""One preconditioner's refresh, with its own problems solved."""

from collections.abc import Mapping

from torch import Tensor

from ngd_dist.inversion import solve
from ngd_dist.preconditioners import Cache, Preconditioner
from ngd_dist.preconditioners.base import Refreshed


def refresh(
    method: Preconditioner, statistics: Mapping[str, Tensor], fresh: frozenset[str], damping: float, old: Cache | None
) -> Refreshed:
    return method.refresh(statistics, fresh, damping, old, solve(method.problems(statistics, fresh, damping, old)))
