"""The problems of inverting or decomposing a factor, and their solutions.

A factor succeeds or fails as a whole: its blocks are refreshed together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, NamedTuple

from torch import Tensor

__all__ = [
    "MAX_RESIDUAL",
    "Direct",
    "Eigen",
    "Ending",
    "Inverse",
    "Method",
    "Problem",
    "RawInverse",
    "Solution",
    "ToDecompose",
    "ToInvert",
]

# ||I - X inverse||_F / sqrt(n) above which an inverse is not used: a direction could be off by as much.
MAX_RESIDUAL = 0.05
# One inverse per block, not judged yet, and [B, 3]: whether the matrix was finite, whether it was positive definite,
# and the residual. Both are on the device: reading them waits for the inversion.
RawInverse = tuple[Tensor, Tensor]


class Ending(IntEnum):
    """The ending of a factor's refresh. The integer travels between ranks."""

    OK = 0
    NON_FINITE = 1
    NOT_POSITIVE_DEFINITE = 2
    INACCURATE = 3
    NOT_CONVERGED = 4

    @property
    def advice(self) -> str:
        """Returns the likely cause and a remedy, as one sentence."""
        return _ADVICE[self]


_ADVICE = {
    Ending.OK: "",
    Ending.NON_FINITE: "the statistic has NaN or infinity: the loss diverged, or activations overflowed; lower lr",
    Ending.NOT_POSITIVE_DEFINITE: "the damped factor is not positive definite in its precision; raise damping",
    Ending.INACCURATE: "the inverse leaves too large a residual: the factor is too ill-conditioned; raise damping",
    Ending.NOT_CONVERGED: "the eigendecomposition did not converge, in float64 neither; the old one stays in use",
}


class Method(IntEnum):
    """The method of an inversion. The integer travels between ranks.

    Those that invert dense factors are numbered in the order in which they are tried.
    """

    RECIPROCAL = 0
    WARM_NEWTON_SCHULZ = 1
    NEWTON_SCHULZ = 2
    CHOLESKY = 3
    CHOLESKY_FLOAT64 = 4
    WOODBURY = 5
    EIGENDECOMPOSITION = 6


@dataclass(frozen=True, slots=True)
class Inverse:
    """The inverse if there is one, the ending, the residual, and the last method that was tried.

    The residual is ||I - X inverse||_F / sqrt(n), estimated, the largest over the blocks. `iterations`: the number that
    Newton-Schulz took, 0 for other methods.
    """

    value: Tensor | None
    ending: Ending
    residual: float = float("nan")
    method: Method = Method.CHOLESKY
    iterations: int = 0


@dataclass(frozen=True, slots=True)
class Eigen:
    """Eigenvalues [B, n], clamped at 0, and eigenvectors as columns [B, n, n]; None if it failed."""

    method: ClassVar[Method] = Method.EIGENDECOMPOSITION
    values: Tensor | None
    vectors: Tensor | None
    ending: Ending


class Direct(NamedTuple):
    """The only method for factors of some form. `inverse` takes factors [B, ...] and dampings [B]."""

    method: Method
    inverse: Callable[[Tensor, Tensor], RawInverse]


@dataclass(frozen=True, slots=True)
class ToInvert:
    """factor + damping * I is to be inverted, damping [B]. `old` is the inverse in use, if any.

    If there is a `direct` way, the factor is its argument, [B, ...]; else the factor is dense, [B, n, n] and symmetric,
    and the ladder decides the method.
    """

    factor: Tensor
    damping: Tensor
    old: Tensor | None = None
    direct: Direct | None = None

    def parts(self, count: int) -> "list[Problem]":
        """Returns the problems of `count` equal parts of the blocks, as views."""
        olds = [None] * count if self.old is None else self.old.chunk(count)
        parts = zip(self.factor.chunk(count), self.damping.chunk(count), olds, strict=True)
        return [ToInvert(factor, damping, old, self.direct) for factor, damping, old in parts]


@dataclass(frozen=True, slots=True)
class ToDecompose:
    """A symmetric factor [B, n, n] is to be decomposed into eigenvalues and eigenvectors."""

    factor: Tensor

    def parts(self, count: int) -> "list[Problem]":
        """Returns the problems of `count` equal parts of the blocks, as views."""
        return [ToDecompose(factor) for factor in self.factor.chunk(count)]


Problem = ToInvert | ToDecompose
Solution = Inverse | Eigen
