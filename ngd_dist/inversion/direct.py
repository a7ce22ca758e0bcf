"""Methods with a fixed amount of work: Cholesky, Woodbury's identity, reciprocals, the eigendecomposition."""

from functools import lru_cache

import torch
from torch import Tensor

from ngd_dist.inversion.ladder import ending_of
from ngd_dist.inversion.problem import Eigen, Ending, Inverse, Method, RawInverse
from ngd_dist.inversion.woodbury import damped_inverse, product_left

__all__ = [
    "cholesky",
    "damped",
    "eigen",
    "error_of",
    "invert",
    "invert_diagonal",
    "invert_rows",
    "judged",
    "outcome",
    "probes",
    "reciprocal",
    "woodbury",
]

PROBES = 4


def invert(factor: Tensor, damping: Tensor) -> Inverse:
    """Returns the inverse of factor + damping * I by Cholesky, in the dtype of the factor (float32 or float64).

    factor [B, n, n] symmetric; damping [B]. Reads its outcome back to the host, once.
    """
    return judged(Method.CHOLESKY, *_outcome(cholesky(damped(factor, damping))))


def invert_diagonal(factor: Tensor, damping: Tensor) -> Inverse:
    """Returns the inverse of a diagonal factor [B, n] + damping [B], entry by entry."""
    return judged(Method.RECIPROCAL, *_outcome(reciprocal(factor, damping)))


def invert_rows(rows: Tensor, damping: Tensor) -> Inverse:
    """Returns Z of `woodbury.damped_inverse` for rows [B, R, n] and damping [B]."""
    return judged(Method.WOODBURY, *_outcome(woodbury(rows, damping)))


def judged(method: Method, value: Tensor, outcomes: list[list[float]], iterations: int = 0) -> Inverse:
    """Returns the inverse of one factor, if all of its blocks have one, from the outcomes of its blocks."""
    finite, definite, residuals = zip(*outcomes, strict=True)
    residual = max(residuals, key=lambda r: (r != r, r))  # NaN is the largest
    ending = ending_of(method, is_finite=all(finite), is_definite=all(definite), residual=residual)
    return Inverse(value if ending is Ending.OK else None, ending, residual, method, iterations)


def damped(factor: Tensor, damping: Tensor) -> Tensor:
    """Returns factor + damping * I, a new tensor."""
    matrix = factor.clone()
    matrix.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
    return matrix


def cholesky(matrix: Tensor, dtype: torch.dtype | None = None) -> RawInverse:
    """Returns the inverses of positive definite matrices [B, n, n], rounded to a dtype before they are judged."""
    # The upper triangle decides, here and where statistics travel or are saved: a product X^T X is not symmetric to the
    # bit on every processor.
    triangle, info = torch.linalg.cholesky_ex(matrix, upper=True)
    is_definite = info == 0
    # cholesky_inverse raises on a zero of the diagonal, which a factorisation that failed may leave.
    triangle.diagonal(dim1=-2, dim2=-1).masked_fill_(~is_definite.unsqueeze(-1), 1)
    value = torch.cholesky_inverse(triangle, upper=True)
    # LAPACK writes column by column. Other ranks get the inverse row by row, and a product of other strides rounds
    # otherwise on some processors; LAPACK's is symmetric to the bit, so that its transpose is itself.
    value = (value.triu() + value.triu(1).mT if value.is_cuda else value.mT).to(dtype or matrix.dtype)
    return value, outcome(matrix, value, is_definite)


def woodbury(rows: Tensor, damping: Tensor) -> RawInverse:
    """Returns Z of `woodbury.damped_inverse`, [B, R, n], for rows [B, R, n]."""
    value, info = damped_inverse(rows, damping)
    columns = probes(rows).expand(len(rows), -1, -1)
    solved = product_left(value, columns)
    rest = columns - solved - rows.mT @ (rows @ solved) / damping.view(-1, 1, 1)
    return value, _facts(rows, info == 0, rest)


def reciprocal(factor: Tensor, damping: Tensor) -> RawInverse:
    """Returns the inverses of diagonal factors [B, n] + damping [B]."""
    value = (factor + damping.unsqueeze(-1)).reciprocal()
    is_finite, is_definite = torch.isfinite(factor).all(-1), torch.isfinite(value).all(-1)
    return value, torch.stack([is_finite, is_definite, torch.zeros_like(is_finite)], -1).to(factor.dtype)


def outcome(matrix: Tensor, inverse: Tensor, is_definite: Tensor) -> Tensor:
    """Returns [B, 3]: see `RawInverse`. The residual is that of the rounded inverse, in the dtype of the matrix.

    It is ||V - X (inverse V)||_F / ||V||_F for a few random columns V, O(n^2), where the full product is O(n^3). Its
    square has the mean ||I - X inverse||_F^2 / n.
    """
    columns = probes(matrix)
    return _facts(matrix, is_definite, columns - matrix @ (inverse.to(matrix.dtype) @ columns))


def probes(like: Tensor) -> Tensor:
    """Returns random columns [n, PROBES], the same on every rank and device, for matrices or rows [..., n]."""
    return _probes(like.shape[-1], like.dtype, like.device)


@lru_cache(maxsize=256)
def _probes(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, PROBES, generator=generator, dtype=torch.float64).to(device, dtype)


def eigen(factor: Tensor) -> Eigen:
    """Returns the eigendecomposition of a symmetric factor [B, n, n], in its dtype; in float64 if that fails.

    Clustered eigenvalues can keep the float32 routine from converging (facebookresearch/optimizers#13).
    """
    if not bool(torch.isfinite(factor).all()):
        return Eigen(None, None, Ending.NON_FINITE)
    for dtype in dict.fromkeys((factor.dtype, torch.float64)):
        try:
            values, vectors = torch.linalg.eigh(factor.to(dtype), UPLO="U")
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        if bool(torch.isfinite(values).all() & torch.isfinite(vectors).all()):
            # Row by row, as on other ranks: see `cholesky`.
            return Eigen(values.clamp(min=0).to(factor.dtype), vectors.to(factor.dtype).contiguous(), Ending.OK)
    return Eigen(None, None, Ending.NOT_CONVERGED)


def error_of(factor: Tensor, damping: Tensor, inverse: Tensor) -> Tensor:
    """Returns ||I - (factor + damping I) inverse||_F / sqrt(n), [], the largest of the blocks, estimated in O(n^2).

    factor and inverse: [B, n, n]. damping: [B].
    """
    return outcome(damped(factor, damping), inverse, damping > 0)[:, -1].amax()


def _facts(given: Tensor, is_definite: Tensor, rest: Tensor) -> Tensor:
    """Returns [B, 3] from the inverted matrices or rows, [B, ..., n], and the rest of the probes, [B, n, PROBES]."""
    residual = torch.linalg.vector_norm(rest, dim=(-2, -1)) / torch.linalg.vector_norm(probes(given))
    is_finite = torch.isfinite(given.sum((-2, -1)))  # a sum has NaN or infinity if an entry has
    return torch.stack([is_finite.to(residual.dtype), is_definite.to(residual.dtype), residual], -1)


def _outcome(inverse: RawInverse) -> tuple[Tensor, list[list[float]]]:
    value, outcomes = inverse
    return value, outcomes.reshape(-1, outcomes.shape[-1]).tolist()
