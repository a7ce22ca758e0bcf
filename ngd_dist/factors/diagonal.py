"""A factor kept as its diagonal."""

import torch
from torch import Tensor

from ngd_dist.factors.form import FactorForm, Replicate
from ngd_dist.factors.kronecker import square_moment
from ngd_dist.inversion import Direct, Eigen, Ending, Method, Solution, reciprocal

__all__ = ["Diagonal"]


class Diagonal(FactorForm):
    """[B, n]. Its eigenvectors are the standard basis, and its own entries the eigenvalues."""

    direct = Direct(Method.RECIPROCAL, reciprocal)

    def dense(self, value: Tensor) -> Tensor:
        return torch.diag_embed(value)

    def moment(self, rows_BNPD: Tensor, scale: float | Tensor, replicate: Replicate) -> Tensor:
        return square_moment(rows_BNPD, scale)

    def mean_eigenvalue(self, value: Tensor) -> Tensor:
        return value.mean(-1)

    def error(self, value: Tensor, damping: Tensor, inverse: Tensor) -> Tensor | None:
        rest = 1 - (value + damping.unsqueeze(-1)) * inverse.to(value.dtype)
        return rest.square().mean(-1).sqrt().amax()

    @property
    def basis(self) -> None:
        return None

    def to_decompose(self, value: Tensor) -> None:
        return None

    def eigen(self, value: Tensor, solution: Solution | None) -> Eigen:
        return Eigen(value, None, Ending.OK if bool(torch.isfinite(value).all()) else Ending.NON_FINITE)

    def left(self, inverse: Tensor, matrix_BnI: Tensor) -> Tensor:
        return inverse.unsqueeze(-1) * matrix_BnI

    def right(self, matrix_BOn: Tensor, inverse: Tensor) -> Tensor:
        return matrix_BOn * inverse.unsqueeze(-2)

    @property
    def product_flops(self) -> int:
        return 1

    @property
    def inverse_flops(self) -> int:
        return 2 * self.shape[0] * self.shape[-1]
