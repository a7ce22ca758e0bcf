"""Pure functions on rows, and on the bases and eigenvalues of Kronecker factors.

Shapes: B blocks, N samples, P positions (1 when dense), I inputs (+1 with bias), O outputs. A basis is [B, n, n] with a
vector in each column, or None for the standard basis.
"""

import torch
from torch import Tensor

__all__ = [
    "first_moment",
    "from_basis",
    "outer",
    "pi_split",
    "sampled",
    "second_moment",
    "square_moment",
    "to_basis",
]


# Width of the blocks in which the lower half of a second moment is multiplied on a CPU. In one thread that takes 0.6 to
# 0.8 of the time of the whole at 500 to 2,000 columns, and as long at 256.
TRIANGLE = 128


def second_moment(rows_BNPD: Tensor, scale: float | Tensor) -> Tensor:
    """Returns scale * sum over n and p of r r^T, [B, D, D], in the dtype of the rows. scale: a number, or [B]."""
    rows = rows_BNPD.flatten(1, 2)
    n = rows.shape[-1]
    if n <= TRIANGLE or (isinstance(scale, torch.Tensor) and (scale.numel() > 1 or scale.device.type != "cpu")):
        moment: Tensor = rows.mT @ rows
        is_one = isinstance(scale, float) and scale == 1.0
        return moment if is_one else moment.mul_(_per_block(scale, rows, 2))
    # One pass over the result instead of two, and on a CPU hardly more than half of the products.
    moment, width = rows.new_empty(len(rows), n, n), n if rows.is_cuda else TRIANGLE
    for first in range(0, n, width):
        part = moment[:, first : first + width, : first + width]
        left, right = rows[:, :, first : first + width].mT, rows[:, :, : first + width]
        torch.baddbmm(part, left, right, beta=0, alpha=float(scale), out=part)
        moment[:, :first, first : first + width] = part[:, :, :first].mT
    return moment


def sampled(rows_BRD: Tensor, count: int, seed: int) -> Tensor:
    """Returns `count` of the R rows, drawn without replacement, times sqrt(R / count); all rows if there are fewer.

    The mean of the sum of r r^T over draws is that over all rows. All blocks and all devices draw the same rows.
    """
    rows = rows_BRD.shape[1]
    if rows <= count:
        return rows_BRD
    chosen = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:count]
    scale: float = (rows / count) ** 0.5
    return rows_BRD.index_select(1, chosen.to(rows_BRD.device)) * scale


def square_moment(rows_BNPD: Tensor, scale: float | Tensor) -> Tensor:
    """Returns scale * sum over n and p of r^2, [B, D]: the diagonal of `second_moment`."""
    return rows_BNPD.square().sum((1, 2)) * _per_block(scale, rows_BNPD, 1)


def first_moment(rows_BNPD: Tensor, scale: float | Tensor) -> Tensor:
    """Returns scale * sum over n and p of r, [B, D]. scale: a number, or [B]."""
    return rows_BNPD.sum((1, 2)) * _per_block(scale, rows_BNPD, 1)


def to_basis(A_basis: Tensor | None, G_basis: Tensor | None, grad_BOI: Tensor) -> Tensor:
    """Returns U_G^T grad U_A, [B, O, I]: the gradient's entries in the two bases."""
    right = grad_BOI if A_basis is None else grad_BOI @ A_basis
    return right if G_basis is None else G_basis.mT @ right


def from_basis(A_basis: Tensor | None, G_basis: Tensor | None, entries_BOI: Tensor) -> Tensor:
    """Returns U_G entries U_A^T, [B, O, I]: the inverse of `to_basis`."""
    right = entries_BOI if A_basis is None else entries_BOI @ A_basis.mT
    return right if G_basis is None else G_basis @ right


def outer(values_BO: Tensor, values_BI: Tensor) -> Tensor:
    """Returns the products of two factors' eigenvalues, [B, O, I]."""
    return values_BO.unsqueeze(-1) * values_BI.unsqueeze(-2)


def _per_block(scale: float | Tensor, like: Tensor, dims: int) -> float | Tensor:
    if not isinstance(scale, torch.Tensor):
        return scale
    return scale.to(like.device, like.dtype).view(-1, *[1] * dims)


def pi_split(mean_a: Tensor, mean_g: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Returns the multiples of I to add to A and to G: pi sqrt(lambda) and sqrt(lambda) / pi, both [B].

    mean_a, mean_g: [B], the mean of each factor's diagonal, tr A / dim A and tr G / dim G.

    pi = sqrt(mean_a / mean_g) brings the damped product closest to A (x) G + lambda I in trace norm. If a mean of a
    block is 0, negative or not finite, its pi is 1, so that a dead layer still gets an invertible factor.
    Source: [MG15] section 6.3, trace norm.
    """
    ratio = mean_a / mean_g
    is_alive = (mean_a > 0) & (ratio > 0) & torch.isfinite(ratio)
    pi = torch.where(is_alive, ratio, torch.ones_like(ratio)).sqrt()
    root = damping**0.5
    return pi * root, root / pi
