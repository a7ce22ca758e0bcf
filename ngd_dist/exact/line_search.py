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

    losses: takes lengths [K] in float64 and returns the loss of each, [K], in float64; one that is not finite is never
    taken. It is called once for each group of lengths, with 0 among the first, until shorter ones do no better.

    >>> best_length(lambda lengths: (lengths - 0.5) ** 2, 1.0, GridSearch(), device=torch.device("cpu"))
    (0.5, 0.0)
    """
    powers = torch.arange(grid.count, dtype=torch.float64, device=device)
    # No step comes first, and wins a tie: argmin of torch promises no order, so a tie is decided here.
    lengths = torch.cat([powers.new_zeros(1), lr * grid.base**powers])
    values = torch.empty_like(lengths)
    start = 0
    while start < len(lengths):
        end = min(start + grid.group + (start == 0), len(lengths))
        tried = losses(lengths[start:end])
        values[start:end] = torch.where(tried.isfinite(), tried, torch.inf)
        best = int(values[:end].argmin()) if values[:end].min() < values[0] else 0
        if 0 < best < end - 1:
            break
        start = end
    return float(lengths[best]), float(values[best])
