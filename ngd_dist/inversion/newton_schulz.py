"""Inverses by X <- X + X E with E = I - A X, which squares E.

E must be as accurate as float32. As an operand of X E it may be rounded to 16 bits: the next residual sees the error.
No iterate is symmetrised: that would raise the one-sided residual from roundoff * kappa to roundoff * kappa^2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ngd_dist.inversion.direct import outcome, probes
from ngd_dist.inversion.problem import RawInverse

__all__ = ["Bounds", "bounds", "equilibrated", "iterate", "newton_schulz", "spectral_radius"]

# After this many steps the power method was seen to be 8% below the largest eigenvalue. If it is further below than the
# margin, the iteration may diverge, and its residual shows it.
POWER_STEPS = 6
MARGIN = 1.15


@dataclass(frozen=True, slots=True)
class Bounds:
    """A lower and an upper bound on the eigenvalues of each matrix, [B]."""

    low: Tensor
    high: Tensor

    @property
    def kappa(self) -> Tensor:
        """Bounds on the condition numbers, [B]."""
        return self.high / self.low


def newton_schulz(
    matrix: Tensor, damping: Tensor, old: Tensor | None, iterations: int, *, update_dtype: torch.dtype, residual: str
) -> RawInverse:
    """Returns the inverses of damped matrices [B, n, n], from the old inverses or else from multiples of I.

    The iteration is that of D^-1/2 matrix D^-1/2 with D near the diagonal: rows of any scale then fit 16 bits.
    """
    inner, scale = equilibrated(matrix)
    if old is None:
        bound = bounds(inner, scale, damping)
        start = torch.diag_embed((2 / (bound.low + bound.high)).unsqueeze(-1).expand(inner.shape[:2]))
    else:
        start = old.to(matrix.dtype) / (scale.unsqueeze(-1) * scale.unsqueeze(-2))
    value = iterate(inner, start, iterations, update_dtype=update_dtype, residual=residual)
    value = (value + value.mT) * (scale.unsqueeze(-1) * scale.unsqueeze(-2) / 2)
    return value, outcome(matrix, value, torch.ones_like(damping, dtype=torch.bool))


def equilibrated(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns D^-1/2 matrix D^-1/2 and the diagonal of D^-1/2, [B, n].

    D^-1/2 has powers of two, so that nothing is rounded, and the diagonal is between 1/2 and 2. If a diagonal is not
    positive, it is left as it is: the matrix has no inverse to find.
    """
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    exponent = torch.frexp(diagonal).exponent
    scale = torch.ldexp(torch.ones_like(diagonal), -(exponent // 2)).where(diagonal > 0, 1)
    return matrix * (scale.unsqueeze(-1) * scale.unsqueeze(-2)), scale


def bounds(inner: Tensor, scale: Tensor, damping: Tensor) -> Bounds:
    """Returns bounds on the eigenvalues of equilibrated matrices: the damping from below, the power method from above.

    damping: [B], added to matrices without negative eigenvalues before they were scaled.
    """
    columns = probes(inner).expand(len(inner), -1, -1)
    for _ in range(POWER_STEPS):
        columns = inner @ (columns / torch.linalg.vector_norm(columns, dim=-2, keepdim=True))
    high = MARGIN * torch.linalg.vector_norm(columns, dim=-2).amax(-1)
    return Bounds(damping * scale.square().amin(-1), high)


def spectral_radius(matrix: Tensor, old: Tensor) -> Tensor:
    """Returns the spectral radius of I - matrix old, [B], from below by the power method, without the product."""
    columns, length = probes(matrix).expand(len(matrix), -1, -1), torch.ones_like(matrix[:, :1, :1])
    for _ in range(POWER_STEPS):
        columns = columns / length
        columns = columns - matrix @ (old @ columns)
        # An exact inverse leaves nothing to divide by.
        length = torch.linalg.vector_norm(columns, dim=-2, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
    return length.amax((-2, -1))


def iterate(A: Tensor, X: Tensor, iterations: int, *, update_dtype: torch.dtype, residual: str) -> Tensor:
    """Returns X after `iterations` towards A^-1. residual: "float32" or "split", of three float16 products."""
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)
    halves = _halves(A, torch.float16) if residual == "split" else None
    for _ in range(iterations):
        E = torch.baddbmm(eye, A, X, alpha=-1) if halves is None else eye - _split_product(halves, X)
        X = X + (X @ E if update_dtype == torch.float32 else _rounded_product(X, E, update_dtype))
    return X


@dataclass(frozen=True, slots=True)
class _Halves:
    """2^exponent * (high + low / step), where high and low have 16 bits and the largest of high is between 1/2 and 1.

    step: the reciprocal of the roundoff, so that float16 does not flush `low` to 0. exponent: [B, 1, 1].
    """

    high: Tensor
    low: Tensor
    exponent: Tensor
    step: float


def _halves(M: Tensor, dtype: torch.dtype) -> _Halves:
    step = 2 / torch.finfo(dtype).eps
    exponent = torch.frexp(M.abs().amax((-2, -1), keepdim=True)).exponent
    scaled = torch.ldexp(M, -exponent)
    high = scaled.to(dtype)
    return _Halves(high, ((scaled - high) * step).to(dtype), exponent, step)


def _split_product(a: _Halves, X: Tensor) -> Tensor:
    """Returns a X without the product of the two lower halves: to 22 bits."""
    x = _halves(X, a.high.dtype)
    rest = _product(a.high, x.low) + _product(a.low, x.high)
    return torch.ldexp((_product(a.high, x.high) + rest / a.step).to(X.dtype), a.exponent + x.exponent)


def _rounded_product(X: Tensor, E: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns X E by two products: E is rounded to the dtype, X split in two.

    If X were rounded too, A times its error would be E times roundoff * kappa, and the iteration would diverge from a
    kappa of 1 / roundoff on (measured: 1e4 in float16, 1e3 in bfloat16).
    """
    x, e = _halves(X, dtype), _halves(E, dtype)
    product = _product(x.high, e.high) + _product(x.low, e.high) / x.step
    return torch.ldexp(product.to(X.dtype), x.exponent + e.exponent)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Returns a b in float32, of 16-bit operands. CPUs multiply them in float32, which gives the same and is faster."""
    if a.is_cuda:
        product: Tensor = torch.bmm(a, b, out_dtype=torch.float32)
        return product
    return a.float() @ b.float()
