"""A factor kept as the whole matrix."""

from math import prod

import torch
from torch import Tensor

from ngd_dist.factors.codec import Codec
from ngd_dist.factors.form import FactorForm, Form, InputRows, Replicate
from ngd_dist.factors.kronecker import second_moment
from ngd_dist.factors.storage import Stored, store
from ngd_dist.factors.triangle import OverDiagonal, StoredTriangle, Triangle, pack, packed_size, unpack
from ngd_dist.inversion import error_of

__all__ = ["Dense"]

# If the damping of a dense factor is below this many rounding errors of its trace, its Cholesky inverse is rounding
# error too. Phi of ResNet-18 at 4 and 32 small images, without full rank: a residual up to 0.09 with 1, 0.012 with 10.
ROUNDING_ERRORS = 10


class Dense(FactorForm):
    """[B, n, n], symmetric. Travels, and is remembered, as its packed upper triangle. Its inverse is dense too."""

    @property
    def numbers(self) -> int:
        return prod(self.shape[:-2]) * packed_size(self.shape[-1])

    def flatten(self, value: Tensor) -> Tensor:
        return pack(value).flatten()

    def expand(self, flat: Tensor) -> Tensor:
        n = self.shape[-1]
        return unpack(flat.view(*self.shape[:-2], packed_size(n)), n)

    def rounded(self, exact: torch.dtype, dtype: torch.dtype) -> Codec:
        return OverDiagonal(prod(self.shape[:-2]), self.shape[-1], exact, dtype)

    def in_cache(self, dtype: torch.dtype, kept: torch.dtype | None) -> Codec:
        return Triangle(self.shape, dtype) if kept is None else StoredTriangle(self.shape, dtype, kept)

    def keep(self, entry: Tensor, dtype: torch.dtype) -> Tensor | Stored:
        return store(entry, dtype)

    def dense(self, value: Tensor) -> Tensor:
        return value

    def moment(self, rows_BNPD: Tensor, scale: float | Tensor, replicate: Replicate) -> Tensor:
        return second_moment(rows_BNPD, scale)

    def input_moment(self, rows: InputRows) -> Tensor:
        return rows.input_moment_BII.div_(rows.samples)

    def averaged(self, last: Tensor, new: Tensor, weight: float, *, reuses: bool) -> Tensor:
        # In place: a new tensor of this size takes longer to allocate than to fill.
        return last.lerp_(new, weight) if reuses else torch.lerp(last, new, weight)

    def mean_eigenvalue(self, value: Tensor) -> Tensor:
        return value.diagonal(dim1=-2, dim2=-1).mean(-1)

    @property
    def inverse(self) -> Form:
        return self

    def error(self, value: Tensor, damping: Tensor, inverse: Tensor) -> Tensor | None:
        return error_of(value, damping, inverse)

    def resolved(self, damping: Tensor, mean: Tensor) -> Tensor:
        return torch.maximum(damping, ROUNDING_ERRORS * torch.finfo(mean.dtype).eps * self.shape[-1] * mean)

    def left(self, inverse: Tensor, matrix_BnI: Tensor) -> Tensor:
        return inverse @ matrix_BnI

    def right(self, matrix_BOn: Tensor, inverse: Tensor) -> Tensor:
        return matrix_BOn @ inverse

    @property
    def product_flops(self) -> int:
        return 2 * self.shape[-1]

    @property
    def inverse_flops(self) -> int:
        """By Cholesky and the inverse from it: n^3 / 3 + 2 n^3 / 3 multiply-adds, two operations each."""
        return 2 * self.shape[0] * self.shape[-1] ** 3
