"""The length of a step: the best of a grid."""

from collections.abc import Callable

import torch
from torch import Tensor

from ngd_dist.config.exact import GridSearch

__all__ = ["best_length"]


def best_length(
    losses: Callable[[Tensor], Tensor], lr: float, grid: GridSearch, *, device: torch.device
) -> tuple[float, float]:
    """Returns the length of the least loss, and that loss; the length is 0 if no loss is below that of no step.

    losses: takes lengths [K] in float64, of which the first is 0, and returns the loss of each, [K], in float64; one
    that is not finite is never taken.

    >>> best_length(lambda lengths: (lengths - 0.5) ** 2, 1.0, GridSearch(), device=torch.device("cpu"))
    (0.5, 0.0)
    """
    powers = torch.arange(grid.count, dtype=torch.float64, device=device)
    # No step comes first, and wins a tie: argmin of torch promises no order, so a tie is decided here.
    lengths = torch.cat([powers.new_zeros(1), lr * grid.base**powers])
    values = losses(lengths)
    values = torch.where(values.isfinite(), values, torch.inf)
    best = int(values.argmin()) if values.min() < values[0] else 0
    return float(lengths[best]), float(values[best])
