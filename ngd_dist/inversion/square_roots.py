"""Square roots of matrices and their inverses, by eigendecomposition or by coupled Newton-Schulz iterations."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["Method", "Roots", "square_roots"]

Method = Literal["eigh", "newton_schulz"]
# Small eigenvalues grow by 9/4 in an iteration: a condition number of 1e16 takes 46 of them, and six more converge.
MAX_ITERATIONS = 60
CONVERGING = 1e-2  # below this residual an iteration squares it, unless it has met the roundoff


class Roots(NamedTuple):
    """matrix^1/2 and matrix^-1/2, [B, n, n]."""

    root: Tensor
    inverse: Tensor


def square_roots(matrix: Tensor, method: Method = "eigh") -> Roots:
    """Returns the roots of symmetric positive definite matrices [B, n, n]; NaN if a matrix is not that.

    "eigh" computes in float64, "newton_schulz" in the matrix's own precision; the roots have the matrix's.

    >>> roots = square_roots(torch.diag(torch.tensor([4.0, 9.0])).unsqueeze(0))
    >>> roots.root.diagonal(dim1=1, dim2=2)
    tensor([[2., 3.]])
    """
    roots = _by_eigenvalues(matrix.double()) if method == "eigh" else _coupled(matrix)
    return Roots(roots.root.to(matrix.dtype), roots.inverse.to(matrix.dtype))


def _by_eigenvalues(matrix: Tensor) -> Roots:
    if not matrix.isfinite().all():  # LAPACK would raise
        return Roots(*(torch.full_like(matrix, torch.nan) for _ in range(2)))
    values, vectors = torch.linalg.eigh(matrix)
    roots = values.sqrt().unsqueeze(-2)  # NaN of a negative one
    return Roots((vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT)


def _coupled(matrix: Tensor) -> Roots:
    """Y <- Y T and Z <- T Z with T = (3 I - Z Y) / 2, from Y = matrix / c and Z = I; c bounds the eigenvalues."""
    c = torch.linalg.matrix_norm(matrix, keepdim=True)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
    Y, Z, last = matrix / c, eye, torch.inf
    for _ in range(MAX_ITERATIONS):
        E = eye - Z @ Y
        # One number per iteration goes to the host; a refresh is rare.
        residual = float(torch.linalg.matrix_norm(E).max())
        if last < CONVERGING and not residual < last / 2:
            break
        last, T = residual, eye + E / 2
        Y, Z = Y @ T, T @ Z
    return Roots(Y * c.sqrt(), Z / c.sqrt())
