"""An estimate of a factor's eigenvalues from a few products with it, where its inversion makes none.

Lanczos' method turns a random vector into a tridiagonal matrix T of a few rows, on the device and without a wait. The
eigenvalues of T, the Ritz values, lie between those of the factor; the square of an eigenvector's first entry is the
share of the factor's eigenvalues that its Ritz value stands for (stochastic Lanczos quadrature [GM10]). A factor that
has no more rows than T has T's eigenvalues.
"""

from itertools import accumulate

import torch
from torch import Tensor

from ngd_dist.inversion.problem import Method, Problem, ToInvert
from ngd_dist.inversion.solver import exact_products
from ngd_dist.inversion.spectrum import QUANTILES

__all__ = ["STEPS", "WIDTH", "quantiles_of", "tridiagonal"]

STEPS = 24  # rows of T, each of which takes one product
WIDTH = 2 + 2 * STEPS  # numbers of a factor on their way to the host
ROUNDING = 1e-9  # of a count of eigenvalues in float64


def tridiagonal(problem: Problem) -> Tensor | None:
    """Returns the rows of the problem's matrix, the mean damping, and T's diagonal and off-diagonal, [WIDTH], float64.

    Blocks count as one matrix with blocks along its diagonal. Rows X [B, R, n] in place of a matrix count as X X^T,
    which has the eigenvalues of X^T X but for zeros. None: the problem is to decompose, or has a form of its own.
    """
    if not isinstance(problem, ToInvert) or (problem.direct and problem.direct.method is not Method.WOODBURY):
        return None
    factor = problem.factor
    count = factor.shape[0] * factor.shape[1]
    steps, device, dtype = min(STEPS, count), factor.device, factor.dtype
    draws = torch.randn(steps + 1, count, generator=torch.Generator(device).manual_seed(0), dtype=dtype, device=device)
    # Where the vectors that products reach have come to an end, rounding errors lead on to another one. A product that
    # is exactly 0 has none, and so gets some.
    noise = draws * torch.finfo(dtype).eps
    mean = _mean_eigenvalue(problem).clamp(min=torch.finfo(dtype).tiny)  # float32 has no square of 1e-20
    vectors, products, rests = draws, torch.empty_like(noise[:steps]), []
    vectors[0].div_(torch.linalg.vector_norm(vectors[0]))
    with exact_products():
        for i in range(steps):
            products[i].copy_(_product(problem, vectors[i]))
            rest, basis = torch.addcdiv(noise[i + 1], products[i], mean), vectors[: i + 1]
            for _ in range(2):  # once leaves what rounding makes of a large part that is taken away
                rest = torch.addmv(rest, basis.mT, basis.mv(rest), alpha=-1)
            rests.append(torch.linalg.vector_norm(rest))
            torch.div(rest, rests[-1], out=vectors[i + 1])
    diagonal, beside = (products * vectors[:steps]).sum(-1), torch.stack(rests) * mean
    rows, rest = mean.new_full((1,), count), mean.new_zeros(STEPS - steps)
    # The last of `beside` leads out of T.
    return torch.cat([rows, problem.damping.mean().view(1), diagonal, rest, beside, rest]).double()


def quantiles_of(told: Tensor, width: int) -> tuple[float, float, float, float, float] | None:
    """Returns the quantiles of `width` eigenvalues from what `tridiagonal` told; None if the factor is not finite.

    Those beyond the rows that it told are 0. told: [WIDTH], on the host. They are exact if the rows are no more than
    STEPS. If they are more, the largest is a lower bound, close to it, and the least an upper bound.

    >>> matrix = torch.diag(torch.tensor([4.0, 1.0, 2.0, 3.0, 5.0])).unsqueeze(0)
    >>> told = tridiagonal(ToInvert(matrix, damping=torch.ones(1)))
    >>> [round(value, 3) for value in quantiles_of(told, 5)]
    [1.0, 2.0, 3.0, 4.0, 5.0]
    """
    if not bool(told.isfinite().all()):
        return None
    rows = int(told[0])
    steps = min(rows, STEPS)
    beside = told[2 + STEPS : 1 + STEPS + steps]
    T = torch.diag(told[2 : 2 + steps]) + torch.diag(beside, 1) + torch.diag(beside, -1)
    values, vectors = torch.linalg.eigh(T)
    stands_for = [1.0] * steps if rows <= STEPS else (rows * vectors[0].square()).tolist()
    known = [0.0] * (width > rows) + values.clamp(min=0).tolist()
    until = [*accumulate([width - rows] * (width > rows) + stands_for)]

    def at(place: int) -> float:
        return float(next((v for v, end in zip(known, until, strict=True) if end > place + ROUNDING), known[-1]))

    low, middle, high = (at(round(share * (width - 1))) for share in QUANTILES[1:-1])
    return known[0], low, middle, high, known[-1]


def _mean_eigenvalue(problem: ToInvert) -> Tensor:
    if problem.direct is None:
        return problem.factor.diagonal(dim1=-2, dim2=-1).mean()
    return problem.factor.square().sum(-1).mean()


def _product(problem: ToInvert, vector: Tensor) -> Tensor:
    """Returns the product with a vector [B n], of the same shape."""
    of_blocks = vector.view(len(problem.factor), -1, 1)
    if problem.direct is None:
        return (problem.factor @ of_blocks).view(-1)
    return (problem.factor @ (problem.factor.mT @ of_blocks)).view(-1)
