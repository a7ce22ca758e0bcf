"""A factor of which some rows and the diagonal are kept, for roots whose K K^T is a diagonal and a low rank."""

import torch
from torch import Tensor

from ngd_dist.factors.codec import Codec, OverPowerOfTwo
from ngd_dist.factors.form import Replicate
from ngd_dist.factors.structure import Structure, least_norm

__all__ = ["LowRankStructure"]


class LowRankStructure(Structure):
    """[B, R + 1, n]: the first R rows of a matrix, and its diagonal, which begins with R zeros.

    A root is K = [[P, Q], [0, D]], with P [R, R] and a diagonal D: K K^T = [[P P^T + Q Q^T, Q D], [D Q^T, D^2]]. The
    projection takes Q twice, for the entries below the diagonal, which K has not: as in the source's code.
    """

    def dense(self, value: Tensor) -> Tensor:
        top, diagonal = value[:, :-1], value[:, -1]
        whole, rank = torch.diag_embed(diagonal), top.shape[1]
        whole[:, :rank] = top
        whole[:, rank:, :rank] = top[..., rank:].mT
        return whole

    def norm(self, value: Tensor, replicates: int = 1) -> Tensor:
        P, Q, D = _parts(value)
        norm: Tensor = (P.square().sum() + 2 * Q.square().sum() + D.square().sum()).sqrt()
        return norm

    def distance(self, value: Tensor, other: Tensor) -> Tensor:
        return self.norm(value - other)

    def rounded(self, exact: torch.dtype, dtype: torch.dtype) -> Codec:
        return OverPowerOfTwo(self.numbers, exact, dtype)

    def moment(self, rows_BNPD: Tensor, scale: float | Tensor, replicate: Replicate) -> Tensor:
        rows, rank = rows_BNPD.flatten(1, 2), self.shape[1] - 1
        diagonal = rows[..., rank:].square().sum(1)
        if isinstance(scale, torch.Tensor):
            scale = scale.to(rows).view(-1, 1, 1)
        return _packed(rows[..., :rank].mT @ rows, diagonal) * scale

    def mean_eigenvalue(self, value: Tensor) -> Tensor:
        return (value.diagonal(dim1=-2, dim2=-1)[:, :-1].sum(-1) + value[:, -1].sum(-1)) / self.shape[-1]

    def identity(self, scale_B: Tensor) -> Tensor:
        _, rows, n = self.shape
        top = torch.eye(rows - 1, n, dtype=scale_B.dtype, device=scale_B.device)
        return scale_B.view(-1, 1, 1) * _packed(top.unsqueeze(0), top.new_ones(1, n - rows + 1))

    def conjugated(self, root: Tensor, value: Tensor) -> Tensor:
        (P, Q, D), (X, Y, d) = _parts(root), _parts(value)
        right = X @ Q
        beside = right + Y * D.unsqueeze(1)  # rows of X K, at the columns of Q
        diagonal = (Q * (right + 2 * Y * D.unsqueeze(1))).sum(1) + D.square() * d
        return _packed(torch.cat([P.mT @ X @ P, 2 * P.mT @ beside], -1), diagonal)

    def squared(self, root: Tensor) -> Tensor:
        P, Q, D = _parts(root)
        return _packed(torch.cat([P.mT @ P, 2 * P.mT @ Q], -1), Q.square().sum(1) + D.square())

    def product(self, root: Tensor, step: Tensor) -> Tensor:
        (P, Q, D), (p, q, d) = _parts(root), _parts(step)
        return _packed(torch.cat([P @ p, P @ q + Q * d.unsqueeze(1)], -1), D * d)

    def bound(self, step: Tensor) -> Tensor:
        P, _, D = _parts(step)  # m is triangular: its eigenvalues are those of P and of D
        return torch.maximum(least_norm(P), D.abs().amax(-1))

    def right(self, matrix_BOn: Tensor, inverse: Tensor) -> Tensor:
        P, Q, D = _parts(inverse)
        rank = P.shape[-1]
        first, rest = matrix_BOn[..., :rank], matrix_BOn[..., rank:]
        beside = first @ Q + rest * D.unsqueeze(1)
        return torch.cat([first @ (P @ P.mT) + beside @ Q.mT, beside * D.unsqueeze(1)], -1)

    @property
    def product_flops(self) -> int:
        return 4 * (self.shape[1] - 1) + 2

    @property
    def inverse_flops(self) -> int:
        """Of a step of the root: four products of R x R with R x n."""
        blocks, rows, n = self.shape
        return 8 * blocks * (rows - 1) ** 2 * n + 10 * blocks * n


def _parts(value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns P [B, R, R], Q [B, R, n - R] and the diagonal D [B, n - R]."""
    rank = value.shape[1] - 1
    return value[:, :-1, :rank], value[:, :-1, rank:], value[:, -1, rank:]


def _packed(top_BRn: Tensor, diagonal: Tensor) -> Tensor:
    """Returns rows and the rest of the diagonal as one value."""
    whole = torch.nn.functional.pad(diagonal, (top_BRn.shape[1], 0))
    return torch.cat([top_BRn, whole.unsqueeze(1)], 1)
