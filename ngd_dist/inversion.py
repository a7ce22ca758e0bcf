"""Inverses and eigenbases of factors. How it went is part of the result; nothing is printed or raised.

A factor is [B, n, n], symmetric, or [B, n], diagonal. It succeeds or fails as a whole: its blocks are refreshed
together. `solve` gets all factors of a step at once.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from ngd_dist.finite import is_finite
from ngd_dist.woodbury import damped_inverse, product_left

__all__ = [
    "Eigen",
    "Ending",
    "Inverse",
    "Problem",
    "Solution",
    "ToDecompose",
    "ToInvert",
    "ToInvertRows",
    "eigen",
    "invert",
    "invert_diagonal",
    "invert_rows",
    "solve",
]


class Ending(IntEnum):
    """How a refresh of a factor ended. The integer is what travels between ranks."""

    OK = 0
    NON_FINITE = 1
    NOT_POSITIVE_DEFINITE = 2
    INACCURATE = 3
    NOT_CONVERGED = 4

    @property
    def advice(self) -> str:
        """Returns the likely cause and what to try, as one sentence."""
        return _ADVICE[self]


_ADVICE = {
    Ending.OK: "",
    Ending.NON_FINITE: "the statistic has NaN or infinity: the loss diverged, or activations overflowed; lower lr",
    Ending.NOT_POSITIVE_DEFINITE: "the damped factor is not positive definite in its precision; raise damping",
    Ending.INACCURATE: "the inverse leaves too large a residual: the factor is too ill-conditioned; raise damping",
    Ending.NOT_CONVERGED: "the eigendecomposition did not converge, in float64 neither; the old one stays in use",
}

# ||I - X inverse||_F / sqrt(n) above which an inverse is not used: a direction could be off by as much.
MAX_RESIDUAL = 0.05
PROBES = 4


@dataclass(frozen=True, slots=True)
class Inverse:
    """The inverse where there is one, how the inversion ended, and ||I - X inverse||_F / sqrt(n), estimated.

    The residual is the largest over the blocks.
    """

    value: Tensor | None
    ending: Ending
    residual: float = float("nan")


def invert(factor: Tensor, damping: Tensor) -> Inverse:
    """Returns the inverse of factor + damping * I by Cholesky, in the dtype of the factor (float32 or float64).

    factor [B, n, n] symmetric; damping [B]. Reads three numbers back to the host, once per refresh of a factor.
    """
    damped = factor.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
    if not bool(torch.isfinite(damped).all()):
        return Inverse(None, Ending.NON_FINITE)
    triangle, info = torch.linalg.cholesky_ex(damped)
    if bool(info.any()):
        return Inverse(None, Ending.NOT_POSITIVE_DEFINITE)
    value = torch.cholesky_inverse(triangle)
    residual = _residual(damped, value)
    if not residual <= MAX_RESIDUAL:
        return Inverse(None, Ending.INACCURATE, residual)
    return Inverse(value, Ending.OK, residual)


def invert_diagonal(factor: Tensor, damping: Tensor) -> Inverse:
    """Returns the inverse of a diagonal factor [B, n] + damping [B], entry by entry."""
    value = (factor + damping.unsqueeze(-1)).reciprocal()
    if bool(torch.isfinite(value).all()):
        return Inverse(value, Ending.OK, 0.0)
    finite = bool(torch.isfinite(factor).all())
    return Inverse(None, Ending.NOT_POSITIVE_DEFINITE if finite else Ending.NON_FINITE)


def invert_rows(rows: Tensor, damping: Tensor) -> Inverse:
    """Returns Z of `woodbury.damped_inverse` for rows [B, R, n] and damping [B]."""
    value, info = damped_inverse(rows, damping)
    if bool(info.any()):
        return Inverse(None, Ending.NOT_POSITIVE_DEFINITE if is_finite(rows) else Ending.NON_FINITE)
    probes = _probes(rows.shape[-1], rows.dtype, rows.device).expand(rows.shape[0], -1, -1)
    solved = product_left(value, probes)
    rest = probes - solved - rows.mT @ (rows @ solved) / damping.view(-1, 1, 1)
    residual = float(torch.linalg.vector_norm(rest, dim=(-2, -1)).max() / torch.linalg.vector_norm(probes[0]))
    if not residual <= MAX_RESIDUAL:
        return Inverse(None, Ending.INACCURATE, residual)
    return Inverse(value, Ending.OK, residual)


@dataclass(frozen=True, slots=True)
class Eigen:
    """Eigenvalues [B, n], clamped at 0, and eigenvectors as columns [B, n, n]; None where it failed."""

    values: Tensor | None
    vectors: Tensor | None
    ending: Ending


def eigen(factor: Tensor) -> Eigen:
    """Returns the eigendecomposition of a symmetric factor [B, n, n], in its dtype; in float64 if that fails.

    Clustered eigenvalues can keep the float32 routine from converging (facebookresearch/optimizers#13).
    """
    if not bool(torch.isfinite(factor).all()):
        return Eigen(None, None, Ending.NON_FINITE)
    for dtype in dict.fromkeys((factor.dtype, torch.float64)):
        try:
            values, vectors = torch.linalg.eigh(factor.to(dtype))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        if bool(torch.isfinite(values).all() & torch.isfinite(vectors).all()):
            return Eigen(values.clamp(min=0).to(factor.dtype), vectors.to(factor.dtype), Ending.OK)
    return Eigen(None, None, Ending.NOT_CONVERGED)


@dataclass(frozen=True, slots=True)
class ToInvert:
    """factor + damping * I is to be inverted: [B, n, n] or [B, n], damping [B]. `old` is the inverse in use, if any."""

    factor: Tensor
    damping: Tensor
    old: Tensor | None = None


@dataclass(frozen=True, slots=True)
class ToInvertRows:
    """X^T X + damping * I is to be inverted: `rows` X [B, R, n], R < n, damping [B]. The value is Woodbury's Z."""

    rows: Tensor
    damping: Tensor


@dataclass(frozen=True, slots=True)
class ToDecompose:
    """A symmetric factor [B, n, n] whose eigenvalues and eigenvectors are wanted."""

    factor: Tensor


Problem = ToInvert | ToInvertRows | ToDecompose
Solution = Inverse | Eigen
Name = TypeVar("Name", bound=Hashable)


def solve(problems: Mapping[Name, Problem]) -> dict[Name, Solution]:
    """Returns the solution of each problem."""
    return {name: _solve(problem) for name, problem in problems.items()}


def _solve(problem: Problem) -> Solution:
    if isinstance(problem, ToDecompose):
        return eigen(problem.factor)
    if isinstance(problem, ToInvertRows):
        return invert_rows(problem.rows, problem.damping)
    return (invert if problem.factor.ndim == 3 else invert_diagonal)(problem.factor, problem.damping)


def _residual(matrix: Tensor, inverse: Tensor) -> float:
    """Returns ||V - X (inverse V)||_F / ||V||_F for a few random columns V: O(n^2), where the full product is O(n^3).

    Its square has the mean ||I - X inverse||_F^2 / n.
    """
    probes = _probes(matrix.shape[-1], matrix.dtype, matrix.device)
    rest = torch.linalg.vector_norm(probes - matrix @ (inverse @ probes), dim=(-2, -1))
    return float(rest.max() / torch.linalg.vector_norm(probes))


@lru_cache(maxsize=256)
def _probes(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(n)  # the same columns on every rank and device
    return torch.randn(n, PROBES, generator=generator, dtype=torch.float64).to(device, dtype)
