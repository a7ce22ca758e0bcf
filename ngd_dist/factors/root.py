"""A factor kept as its root: R rows X, fewer than its width, that stand for X^T X."""

import torch
from torch import Tensor

from ngd_dist.factors.codec import Codec, OverPowerOfTwo
from ngd_dist.factors.form import FactorForm, Replicate
from ngd_dist.factors.kronecker import sampled
from ngd_dist.inversion import Direct, Method, woodbury
from ngd_dist.inversion.woodbury import product_left, product_right

__all__ = ["Root"]


class Root(FactorForm):
    """[B, R, n], R < n. X^T X is never formed: its norms are those of R x R products, its inverse is Woodbury's Z.

    Each replicate has a share of the R rows, so that values add up to rows side by side.
    """

    direct = Direct(Method.WOODBURY, woodbury)
    lacks_damping = True

    def norm(self, value: Tensor, replicates: int = 1) -> Tensor:
        # One replicate has only the rows of its share, scaled for the mean over all.
        norm: Tensor = torch.linalg.vector_norm(value @ value.mT)
        return norm / replicates

    def distance(self, value: Tensor, other: Tensor) -> Tensor:
        of_value, cross, of_other = (
            torch.linalg.vector_norm(x @ y.mT).square() for x, y in ((value, value), (value, other), (other, other))
        )
        squared: Tensor = (of_value - 2 * cross + of_other).clamp(min=0)  # rounding may leave less than nothing
        return squared.sqrt()

    def times(self, value: Tensor, factor: float | Tensor) -> Tensor:
        return value * factor**0.5

    def mean(self, total: Tensor, passes: int, shares: int, power: float) -> Tensor:
        return self.times(total, power / (passes * shares))

    def rounded(self, exact: torch.dtype, dtype: torch.dtype) -> Codec:
        return OverPowerOfTwo(self.numbers, exact, dtype)

    def dense(self, value: Tensor) -> Tensor:
        return value.mT @ value

    def moment(self, rows_BNPD: Tensor, scale: float | Tensor, replicate: Replicate) -> Tensor:
        """Returns the rows in this replicate's place among zeros; if there are more than its share, some are drawn.

        The mean over replicates is then their rows side by side, scaled to the root of the mean of X^T X.
        """
        share = self.shape[1] // replicate.count
        root = scale**0.5 if isinstance(scale, float) else scale.sqrt()
        rows_BRD = sampled(rows_BNPD.flatten(1, 2), share, replicate.seed)
        placed = rows_BRD.new_zeros(len(rows_BRD), *self.shape[1:])
        first = replicate.index * share
        if isinstance(root, torch.Tensor):
            root = root.to(rows_BRD).view(-1, 1, 1)
        placed[:, first : first + rows_BRD.shape[1]] = rows_BRD * (root * replicate.count**0.5)
        return placed

    def mean_eigenvalue(self, value: Tensor) -> Tensor:
        return value.square().sum((-2, -1)) / self.shape[-1]

    def left(self, inverse: Tensor, matrix_BnI: Tensor) -> Tensor:
        return product_left(inverse, matrix_BnI)

    def right(self, matrix_BOn: Tensor, inverse: Tensor) -> Tensor:
        return product_right(matrix_BOn, inverse)

    @property
    def product_flops(self) -> int:
        return 4 * self.shape[1]

    @property
    def inverse_flops(self) -> int:
        """Of a product of the rows with themselves, and a triangular solve: R^2 n multiply-adds each."""
        blocks, rows, width = self.shape
        return 4 * blocks * rows**2 * width
