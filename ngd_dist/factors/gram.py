"""A factor kept as the whole matrix or, while a step has few rows, as those rows, from which the same follows exactly.

With rows X [B, R, n] that stand for X^T X and K = X X^T, [B, R, R], the Gram matrix:

    X (X^T X + d I)^-1 = (K + d I)^-1 X                      the rows themselves, R^2 operations per number
    M (X^T X + d I)^-1 = (M - M X^T (K + d I)^-1 X) / d      any other rows, by Woodbury's identity

Nothing of n x n numbers is formed. Norms and traces are those of R x R matrices.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ngd_dist.factors.dense import Dense
from ngd_dist.factors.form import InputRows, Replicate, is_one
from ngd_dist.factors.kronecker import second_moment
from ngd_dist.factors.triangle import packed_size
from ngd_dist.inversion import ToInvert

__all__ = ["Gram", "RowInverse", "without_underflow"]

# Below this width a packed inverse has no room for rows and their Gram matrix: see `Gram.pack_inverse`.
MIN_WIDTH = 4


@dataclass(frozen=True, slots=True)
class RowInverse:
    """(X^T X + d I)^-1 by its parts: rows X [B, R, n], inverse (X X^T + d I)^-1 [B, R, R], damping d [B]."""

    rows: Tensor
    inverse: Tensor
    damping: Tensor

    def right(self, matrix_BOn: Tensor) -> Tensor:
        """Returns M (X^T X + d I)^-1, [B, O, n], a new tensor."""
        return self.undivided(matrix_BOn).div_(self.divisor)

    def undivided(self, matrix_BOn: Tensor) -> Tensor:
        """Returns `divisor` times `right`, a new tensor."""
        return torch.baddbmm(matrix_BOn, matrix_BOn @ self.rows.mT, self._solved(), alpha=-1)

    def left(self, matrix_BnI: Tensor) -> Tensor:
        """Returns (X^T X + d I)^-1 M, [B, n, I], a new tensor."""
        product = torch.baddbmm(matrix_BnI, self.rows.mT, self._solved() @ matrix_BnI, alpha=-1)
        return product.div_(self.divisor)

    def dense(self) -> Tensor:
        """Returns the whole inverse, [B, n, n]."""
        identity = torch.eye(self.rows.shape[-1], dtype=self.rows.dtype, device=self.rows.device)
        return self.right(identity.expand(len(self.rows), -1, -1))

    @property
    def divisor(self) -> Tensor:
        """The damping, [B, 1, 1]."""
        return self.damping.view(-1, 1, 1)

    def _solved(self) -> Tensor:
        """Returns (X X^T + d I)^-1 X, made once for all steps that apply it.

        The inverse alone leaves an error that Woodbury's difference makes up to seven times that of a whole inverse.
        One step of iterative refinement brings it to the same.
        """

        def refined() -> Tensor:
            solved = self.inverse @ self.rows
            rest = self.rows - gram(self.rows) @ solved - self.divisor * solved
            return torch.baddbmm(solved, self.inverse, rest)

        return _once(_SOLVED, self.inverse, refined)

    @property
    def solving_flops(self) -> int:
        """The operations before the first product."""
        blocks, rows, width = self.rows.shape
        return 6 * blocks * rows**2 * width


class Gram(Dense):
    """As `Dense`, [B, n, n], or the rows of a step, [B, R, n] with 2 R <= n: the shape of a value says which.

    With twice as many rows a product with the inverse would take longer than one with the whole matrix.
    """

    def is_rows(self, value: Tensor) -> bool:
        """Returns whether the value is rows."""
        return value.shape[-2] < self.shape[-1]

    def moment(self, rows_BNPD: Tensor, scale: float | Tensor, replicate: Replicate) -> Tensor:
        if not (replicate.is_all and self._fits(rows_BNPD.shape[1] * rows_BNPD.shape[2] * replicate.count)):
            return super().moment(rows_BNPD, scale, replicate)
        return without_underflow(_scaled(rows_BNPD, scale))

    def input_moment(self, rows: InputRows) -> Tensor:
        if rows.replicate.is_all and self._fits(rows.count * rows.replicate.count):
            return _scaled(rows.a_BNPI, 1 / rows.samples)
        return super().input_moment(rows)

    def dense(self, value: Tensor) -> Tensor:
        return value.mT @ value if self.is_rows(value) else value

    def whole(self, value: Tensor) -> Tensor:
        return self.dense(value)

    def averaged(self, last: Tensor, new: Tensor, weight: float, *, reuses: bool) -> Tensor:
        return super().averaged(self.dense(last), self.dense(new), weight, reuses=reuses)

    def plus(self, value: Tensor, other: Tensor) -> Tensor:
        both_rows = self.is_rows(value) and self.is_rows(other)
        if both_rows and self._fits(value.shape[1] + other.shape[1]):
            return torch.cat([value, other], dim=1)
        return self.dense(value) + self.dense(other)

    def times(self, value: Tensor, factor: float | Tensor) -> Tensor:
        is_whole = is_one(factor) or not self.is_rows(value)
        return super().times(value, factor) if is_whole else value * factor**0.5

    def weighted(self, value: Tensor, share: float) -> Tensor:
        return self.times(value, share)

    def norm(self, value: Tensor, replicates: int = 1) -> Tensor:
        return super().norm(gram(value) if self.is_rows(value) else value)

    def distance(self, value: Tensor, other: Tensor) -> Tensor:
        if not (self.is_rows(value) and self.is_rows(other)):
            return super().distance(self.dense(value), self.dense(other))
        own, others = (torch.linalg.vector_norm(gram(x)).square() for x in (value, other))
        cross = torch.linalg.vector_norm(value @ other.mT).square()
        squared: Tensor = (own - 2 * cross + others).clamp(min=0)  # rounding may leave less than nothing
        return squared.sqrt()

    def mean_eigenvalue(self, value: Tensor) -> Tensor:
        if not self.is_rows(value):
            return super().mean_eigenvalue(value)
        return gram(value).diagonal(dim1=-2, dim2=-1).sum(-1) / self.shape[-1]

    def problem(self, value: Tensor, damping: Tensor, old: Tensor | None) -> ToInvert:
        """Of rows, the problem is that of their Gram matrix, of which there is no `old` inverse."""
        return ToInvert(gram(value), damping) if self.is_rows(value) else super().problem(value, damping, old)

    def remembered(self, value: Tensor) -> Tensor:
        """Of rows: their numbers, and minus their count in place of a last diagonal entry, which is never < 0."""
        if not self.is_rows(value):
            return super().remembered(value)
        return _padded([value], packed_size(self.shape[-1])).flatten()

    def recalled(self, flat: Tensor) -> Tensor:
        packed = flat.view(self.shape[0], packed_size(self.shape[-1]))
        rows = _count(packed)
        return _parts(packed, [(rows, self.shape[-1])])[0] if rows else super().recalled(flat)

    def pack_inverse(self, parts: RowInverse) -> Tensor:
        """Returns the parts as one tensor of an inverse's shape, [B, n, n]; its last entry is < 0, as in no inverse."""
        return _padded([parts.rows, parts.inverse, parts.damping], self.shape[-1] ** 2).view(self.shape)

    def unpack_inverse(self, packed: Tensor) -> RowInverse | None:
        """Returns the parts that were packed; None if the tensor is the inverse itself. Reads a number back."""
        rows = _count(packed.flatten(1))
        if not rows:
            return None
        X, inverse, damping = _parts(packed.flatten(1), [(rows, self.shape[-1]), (rows, rows), (1, 1)])
        return RowInverse(X, inverse, damping.flatten())

    def _fits(self, rows: int) -> bool:
        return MIN_WIDTH <= self.shape[-1] >= 2 * rows


def _scaled(rows_BNPD: Tensor, scale: float | Tensor) -> Tensor:
    root = scale**0.5 if isinstance(scale, float) else scale.sqrt().to(rows_BNPD).view(-1, 1, 1)
    return rows_BNPD.flatten(1, 2) * root


def without_underflow(rows: Tensor) -> Tensor:
    """Returns the rows with 0 in place of numbers whose squares are none that the dtype holds to its full precision.

    A CPU takes a hundred times as long for a product that is subnormal, and samples that a model is sure of have
    gradients as small as 1e-30.
    """
    return rows if rows.is_cuda else F.hardshrink(rows, torch.finfo(rows.dtype).tiny ** 0.5)


def gram(rows: Tensor) -> Tensor:
    """Returns X X^T, [B, R, R]: computed once, and kept as long as the rows are. It must not be written to."""
    return _once(_GRAMS, rows, lambda: second_moment(rows.mT.unsqueeze(2), 1.0))


# By tensor, by its identity.
_GRAMS = WeakIdKeyDictionary()
_SOLVED = WeakIdKeyDictionary()


def _once(known: WeakIdKeyDictionary, key: Tensor, make: Callable[[], Tensor]) -> Tensor:
    value: Tensor | None = known.get(key)
    if value is None:
        value = known[key] = make()
    return value


def _padded(parts: list[Tensor], size: int) -> Tensor:
    """Returns the parts side by side, zeros, and minus the first part's count of rows: [B, size]."""
    blocks, rows = parts[0].shape[:2]
    flat = torch.cat([part.reshape(blocks, -1) for part in parts], dim=1)
    padded = flat.new_zeros(blocks, size)
    padded[:, : flat.shape[1]] = flat
    padded[:, -1] = -rows
    return padded


def _count(padded: Tensor) -> int:
    last = float(padded[0, -1])
    return int(-last) if last < 0 else 0


def _parts(padded: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
    sizes = [rows * columns for rows, columns in shapes]
    flat = padded[:, : sum(sizes)].split(sizes, dim=1)
    return [part.reshape(len(padded), *shape).clone() for part, shape in zip(flat, shapes, strict=True)]
