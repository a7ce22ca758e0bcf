"""The eigenvalues that a refresh has made anyway, as a few quantiles on their device."""

import torch
from torch import Tensor

from ngd_dist.inversion.problem import Eigen, Method, Problem, Solution, ToInvert

__all__ = ["QUANTILES", "damping_of", "eigenvalues", "quantiles"]

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


def eigenvalues(problem: Problem, solution: Solution) -> Tensor | None:
    """Returns the factor's eigenvalues, [B, n]; None if its method makes none: Cholesky, Newton-Schulz, Woodbury."""
    if isinstance(solution, Eigen):
        return solution.values
    is_diagonal = isinstance(problem, ToInvert) and problem.direct and problem.direct.method is Method.RECIPROCAL
    return problem.factor if is_diagonal and solution.value is not None else None


def damping_of(problem: Problem, damping: float, others: Tensor | None) -> float | Tensor:
    """Returns the damping in the unit of this factor's eigenvalues, 0-d; NaN if it is not known.

    damping: the layer's, which is added to the products of a decomposed factor's eigenvalues and those of the `others`.
    """
    if isinstance(problem, ToInvert):
        return problem.damping.mean()
    return torch.nan if others is None else damping / others.mean()


def quantiles(values: Tensor) -> Tensor:
    """Returns the values that these shares of all don't exceed, [5]; reads nothing back.

    >>> quantiles(torch.tensor([[4.0, 1.0, 2.0, 3.0, 5.0]]))
    tensor([1., 2., 3., 4., 5.])
    """
    in_order = values.flatten().sort().values
    last = in_order.numel() - 1
    return torch.stack([in_order[round(share * last)] for share in QUANTILES])
