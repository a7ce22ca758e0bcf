"""Residuals of a model at points, and their derivatives by its weights, a chunk of points at a time.

Shapes: N points, d coordinates, R residuals of a point, W weights, K vectors of weights.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from ngd_dist.exact.flat import FlatModel

__all__ = ["Field", "Pointwise", "Residual", "jacobian_rows", "pointwise", "squares"]

# The network as a function of one point [d].
Field: TypeAlias = Callable[[Tensor], Tensor]
# By how much a field misses its equation at one point: a scalar, or [R].
Residual: TypeAlias = Callable[[Field, Tensor], Tensor]
# The same as a function of weights [W] and one point [d]; returns [R].
Pointwise: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def pointwise(model: FlatModel, residual: Residual) -> Pointwise:
    """Returns the residual as a function of the weights."""

    def at(weights: Tensor, x: Tensor) -> Tensor:
        return residual(partial(model.at, weights), x).reshape(-1)

    return at


def jacobian_rows(
    residual: Pointwise, weights: Tensor, points: Tensor, *, chunk: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields rows of the Jacobian and their residuals, [n R, W] and [n R], of n <= chunk points each.

    weights: [W]. points: [N, d].
    """

    def twice(weights: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        values = residual(weights, x)
        return values, values

    differentiate = vmap(jacrev(twice, has_aux=True), in_dims=(None, 0))
    for some in points.split(chunk) if len(points) else ():
        jacobian_NRW, values_NR = differentiate(weights, some)
        yield jacobian_NRW.flatten(0, 1), values_NR.flatten()


@torch.no_grad()
def squares(residual: Pointwise, weights_KW: Tensor, points: Tensor, *, chunk: int) -> Tensor:
    """Returns the sum of squared residuals over the points for each vector of weights: [K], float64."""
    total = torch.zeros(len(weights_KW), dtype=torch.float64, device=weights_KW.device)
    evaluate = vmap(vmap(residual, in_dims=(None, 0)), in_dims=(0, None))
    for some in points.split(chunk) if len(points) else ():
        total += evaluate(weights_KW, some).double().square().sum(dim=(1, 2))
    return total
