"""Residuals and energies of a model at points, and their derivatives by its weights, a chunk of points at a time.

Shapes: N points, d coordinates, R residuals of a point or entries of its jet, W weights, K vectors of weights.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from ngd_dist.exact.flat import FlatModel

__all__ = [
    "Density",
    "Energy",
    "Field",
    "Pointwise",
    "Residual",
    "curvature_rows",
    "jacobian_rows",
    "pointwise",
    "square",
    "sums",
]

# The network as a function of one point [d].
Field: TypeAlias = Callable[[Tensor], Tensor]
# By how much a field misses its equation at one point: a scalar, or [R].
Residual: TypeAlias = Callable[[Field, Tensor], Tensor]
# The same as a function of weights [W] and one point [d]; returns [R].
Pointwise: TypeAlias = Callable[[Tensor, Tensor], Tensor]
# A scalar of the values [R] at one point, and that point [d].
Density: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Energy:
    """A part of a loss that is the mean of a density, such as a Deep Ritz energy, in place of a squared residual.

    jet: (u, x) -> the values of the field at one point that the density is a function of, such as [u, u'], [R].
    density: (jet, x) -> scalar, convex in the jet and twice differentiable by torch.func.

    The second variation of E(u) = mean density is D²E(v, w) = mean jet(v)ᵀ H jet(w), with H the Hessian of the density
    by the jet. A residual r is the case jet = r, density = |jet|². Source: arXiv 2302.13163.

    >>> ritz = Energy(  # of -u'' + u³ = 1 with natural boundary conditions
    ...     jet=lambda u, x: torch.cat([u(x).reshape(1), grad(u)(x)]),
    ...     density=lambda jet, x: jet[1] ** 2 / 2 + jet[0] ** 4 / 4 - jet[0],
    ... )
    >>> ritz.jet(lambda x: x.square().sum(), torch.tensor([3.0]))
    tensor([9., 6.])
    """

    jet: Residual
    density: Density


def pointwise(model: FlatModel, residual: Residual) -> Pointwise:
    """Returns the residual as a function of the weights."""

    def at(weights: Tensor, x: Tensor) -> Tensor:
        return residual(partial(model.at, weights), x).reshape(-1)

    return at


def square(values: Tensor, x: Tensor) -> Tensor:
    """Returns the density of a residual."""
    return values.square().sum()


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


def curvature_rows(
    jet: Pointwise, density: Density, weights: Tensor, points: Tensor, *, chunk: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields what the density's mean is near the weights, to second order in the jet, times n, of n <= chunk points.

    Rows C [n R, W] with CᵀC = D²E / 2, the slope DE / 2 [W], and E [], float64. The halves are those of a squared
    residual: JᵀJ, Jᵀr and |r|². Where the density is not convex, negative curvature counts as 0. points: [N, d].
    """
    slope, curvature = vmap(grad(density)), vmap(jacrev(grad(density)))  # forward passes would make torch warn
    for some in points.split(chunk) if len(points) else ():
        ((jacobian_nW, jet_n),) = jacobian_rows(jet, weights, some, chunk=chunk)
        J_NRW = jacobian_nW.double().unflatten(0, (len(some), -1))
        jets_NR, x_Nd = jet_n.double().view(len(some), -1), some.double()
        H_NRR = curvature(jets_NR, x_Nd)
        values_NR, vectors_NRR = torch.linalg.eigh(H_NRR.nan_to_num())  # it raises for NaN, on this rank alone
        values_NR += 0 * H_NRR.sum(2)
        roots_NRR = (values_NR.clamp(min=0) / 2).sqrt().unsqueeze(2) * vectors_NRR.mT
        slope_W = torch.einsum("nrw,nr->w", J_NRW, slope(jets_NR, x_Nd)) / 2
        yield (roots_NRR @ J_NRW).flatten(0, 1), slope_W, vmap(density)(jets_NR, x_Nd).sum()


@torch.no_grad()
def sums(jet: Pointwise, density: Density, weights_KW: Tensor, points: Tensor, *, chunk: int) -> Tensor:
    """Returns the sum of the density over the points for each vector of weights: [K], float64."""
    total = torch.zeros(len(weights_KW), dtype=torch.float64, device=weights_KW.device)

    def at(weights: Tensor, x: Tensor) -> Tensor:
        return density(jet(weights, x).double(), x.double())

    evaluate = vmap(vmap(at, in_dims=(None, 0)), in_dims=(0, None))
    for some in points.split(chunk) if len(points) else ():
        total += evaluate(weights_KW, some).sum(dim=1)
    return total
