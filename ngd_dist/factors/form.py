"""The form in which a statistic, or an entry of a cache, is kept. Start at `Form`; `FactorForm` is that of a matrix.

Each form is one file: `dense`, `diagonal`, `root`. No other code depends on the form of a tensor, so that a new form is
one more file.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ngd_dist.factors.codec import AsItIs, Codec, Copied, OverPowerOfTwo
from ngd_dist.factors.storage import Stored
from ngd_dist.inversion import Direct, Eigen, Solution, ToDecompose, ToInvert

__all__ = ["Entrywise", "FactorForm", "Form", "InputRows", "Replicate"]


@dataclass(frozen=True, slots=True)
class Replicate:
    """One of the equal parts of a global batch: a rank's micro-batch. `seed` decides the rows that are drawn.

    `is_all`: whether the batch has no other part than the `count` of its kind, on this rank, the statistic no past, and
    the layer its own calls: its rows may be kept.
    """

    index: int = 0
    count: int = 1
    seed: int = 0
    is_all: bool = False


class InputRows(Protocol):
    """The input rows of one micro-batch, as `layers.LayerBatch` has them."""

    @property
    def samples(self) -> int:
        """The number of samples."""

    @property
    def count(self) -> int:
        """The number of rows of each block, padding included."""

    @property
    def replicate(self) -> Replicate:
        """The part of the global batch that the rows are from."""

    @property
    def a_BNPI(self) -> Tensor:
        """The rows themselves."""

    @property
    def input_moment_BII(self) -> Tensor:
        """Sum over samples and positions of a a^T, a new tensor; some layers compute it without the rows."""


@dataclass(frozen=True, slots=True)
class Form:
    """A tensor of this shape that stands for itself, and travels as it is.

    sample_dims: the dimensions that grow with the samples of a rank; in `shape` they are those of one sample. A tensor
    that has any does not travel.
    """

    shape: tuple[int, ...]

    sample_dims: ClassVar[tuple[int, ...]] = ()

    @property
    def numbers(self) -> int:
        """Returns the count of numbers that travel and are remembered."""
        return prod(self.shape)

    def flatten(self, value: Tensor) -> Tensor:
        """Returns the value as it is summed over ranks: [numbers]."""
        return value.flatten()

    def expand(self, flat: Tensor) -> Tensor:
        """Returns the value that was flattened."""
        return flat.view(self.shape)

    def norm(self, value: Tensor, replicates: int = 1) -> Tensor:
        """Returns the Frobenius norm of the matrix or tensor that the value stands for, [].

        replicates: their number, if the value is that of one replicate; see `FactorForm.moment`.
        """
        norm: Tensor = torch.linalg.vector_norm(value)
        return norm

    def distance(self, value: Tensor, other: Tensor) -> Tensor:
        """Returns the Frobenius norm of the difference of the matrices or tensors that the values stand for, []."""
        distance: Tensor = torch.linalg.vector_norm(value - other)
        return distance

    def times(self, value: Tensor, factor: float | Tensor) -> Tensor:
        """Returns `factor` times the value, as of the matrix that it stands for. factor: a number, or []."""
        return value if is_one(factor) else value * factor

    def plus(self, value: Tensor, other: Tensor) -> Tensor:
        """Returns the sum of both, as of the matrices that they stand for."""
        return value + other

    def weighted(self, value: Tensor, share: float) -> Tensor:
        """Returns the value as this share of a sum, of which `mean` is taken."""
        return value * share

    def averaged(self, last: Tensor, new: Tensor, weight: float, *, reuses: bool) -> Tensor:
        """Returns last + weight * (new - last), as of the matrices that they stand for.

        reuses: whether nothing but a copy that `remembered` made needs `last` any more.
        """
        return torch.lerp(last, new, weight)

    def remembered(self, value: Tensor) -> Tensor:
        """Returns the value as it is kept for later, and saved: [numbers]."""
        return self.flatten(value)

    def recalled(self, flat: Tensor) -> Tensor:
        """Returns the value that was remembered."""
        return self.expand(flat)

    def whole(self, value: Tensor) -> Tensor:
        """Returns the value in the shape of this form, if a form has values of other shapes."""
        return value

    def mean(self, total: Tensor, passes: int, shares: int, power: float) -> Tensor:
        """Returns `power` times the mean over `passes` micro-batches, from the sum of their values.

        shares: the number of micro-batches among which a form shares out its value, if it does.
        """
        return self.times(total, power / passes)

    @property
    def row_numbers(self) -> int:
        """Returns the length of one of the rows that this is estimated from: a row per sample and position."""
        return prod(self.shape)

    def on_wire(self, exact: torch.dtype, dtype: torch.dtype) -> Codec:
        """Returns the codec of a flat statistic between ranks that sum it.

        exact: the dtype of the sum, float32 or float64. dtype: that on the way, `exact` or one of 16 bits.
        """
        return self.rounded(exact, dtype) if dtype.itemsize == 2 else AsItIs((self.numbers,), exact)

    def rounded(self, exact: torch.dtype, dtype: torch.dtype) -> Codec:
        """Returns the codec for 16 bits: unrounded unless overridden, since vectors of second moments are short."""
        return AsItIs((self.numbers,), exact)

    def in_cache(self, dtype: torch.dtype, kept: torch.dtype | None) -> Codec:
        """Returns the codec of an entry of a cache, which arrives to the bit as its owner applies it.

        dtype: that of the entry. kept: the one of 16 bits in which dense inverses are kept, if any.
        """
        return Copied(self.shape, dtype)

    def keep(self, entry: Tensor, dtype: torch.dtype) -> Tensor | Stored:
        """Returns an entry of a cache as it is stored, if inverses are kept in this dtype of 16 bits."""
        return entry


def is_one(factor: float | Tensor) -> bool:
    """Returns whether the factor is the number 1; a tensor is not read."""
    return not isinstance(factor, Tensor) and factor == 1


class Entrywise(Form):
    """A value for each entry of the gradient, [B, O, I]."""

    @property
    def row_numbers(self) -> int:
        return self.shape[0] * self.shape[-1]

    def rounded(self, exact: torch.dtype, dtype: torch.dtype) -> Codec:
        return OverPowerOfTwo(self.numbers, exact, dtype)


class FactorForm(Form, ABC):
    """A symmetric positive semidefinite matrix [n, n] in each of B blocks: makes, inverts and applies it.

    direct: the one way to invert it; None if the ladder of dense matrices decides. lacks_damping: the inverse is kept
    times the damping, and a direction is divided by that.
    """

    direct: ClassVar[Direct | None] = None
    lacks_damping: ClassVar[bool] = False

    @abstractmethod
    def dense(self, value: Tensor) -> Tensor:
        """Returns the whole matrices, [B, n, n]."""

    @abstractmethod
    def moment(self, rows_BNPD: Tensor, scale: float | Tensor, replicate: Replicate) -> Tensor:
        """Returns scale * the sum over n and p of r r^T in this form. scale: a number, or [B].

        The mean of the replicates' values is that of the whole batch.
        """

    def input_moment(self, rows: InputRows) -> Tensor:
        """Returns the mean over samples, and sum over positions, of a a^T in this form."""
        return self.moment(rows.a_BNPI, 1 / rows.samples, rows.replicate)

    @abstractmethod
    def mean_eigenvalue(self, value: Tensor) -> Tensor:
        """Returns the mean eigenvalue of each block, [B]."""

    @property
    def inverse(self) -> Form:
        """Returns the form of the inverse as an entry of a cache."""
        return Form(self.shape)

    def problem(self, value: Tensor, damping: Tensor, old: Tensor | None) -> ToInvert:
        """Returns the problem of inverting value + damping * I. damping: [B]. old: the inverse in use, if any."""
        return ToInvert(value, damping, old, self.direct)

    def error(self, value: Tensor, damping: Tensor, inverse: Tensor) -> Tensor | None:
        """Returns ||I - (value + damping I) inverse||_F / sqrt(n), [], of the worst block; None if unknown."""
        return None

    def resolved(self, damping: Tensor, mean: Tensor) -> Tensor:
        """Returns the damping, [B], raised if an inverse would be rounding error.

        mean: the mean eigenvalues, [B].
        """
        return damping

    @property
    def basis(self) -> tuple[int, ...] | None:
        """Returns the shape of its eigenvectors, [B, n, n]; None if they are the standard basis."""
        return self.shape[0], self.shape[-1], self.shape[-1]

    def to_decompose(self, value: Tensor) -> ToDecompose | None:
        """Returns the matrices to decompose for `eigen`; None if it needs no decomposition."""
        return ToDecompose(self.dense(value))

    def eigen(self, value: Tensor, solution: Solution | None) -> Eigen:
        """Returns eigenvalues [B, n], and eigenvectors if there is a `basis`. solution: that of `to_decompose`."""
        assert isinstance(solution, Eigen)
        return solution

    @abstractmethod
    def left(self, inverse: Tensor, matrix_BnI: Tensor) -> Tensor:
        """Returns inverse M, [B, n, I], a new tensor."""

    @abstractmethod
    def right(self, matrix_BOn: Tensor, inverse: Tensor) -> Tensor:
        """Returns M inverse, [B, O, n], a new tensor."""

    @property
    @abstractmethod
    def product_flops(self) -> int:
        """Returns the operations of `left` or `right` for each entry of M."""

    @property
    @abstractmethod
    def inverse_flops(self) -> int:
        """Returns the operations of inverting it."""

    @property
    def row_numbers(self) -> int:
        return self.shape[0] * self.shape[-1]
