"""Inverse of one damped factor. How it went is part of the result; nothing is printed or raised."""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

__all__ = ["Ending", "Inverse", "invert"]


class Ending(IntEnum):
    """How a refresh of a factor ended. The integer is what travels between ranks."""

    OK = 0
    NON_FINITE = 1
    NOT_POSITIVE_DEFINITE = 2

    @property
    def advice(self) -> str:
        """Returns the likely cause and what to try, as one sentence."""
        return _ADVICE[self]


_ADVICE = {
    Ending.OK: "",
    Ending.NON_FINITE: "the statistic has NaN or infinity: the loss diverged, or activations overflowed; lower lr",
    Ending.NOT_POSITIVE_DEFINITE: "the damped factor is not positive definite in its precision; raise damping",
}


@dataclass(frozen=True, slots=True)
class Inverse:
    """The inverse where there is one, and how the inversion ended."""

    value: Tensor | None
    ending: Ending


def invert(matrix: Tensor, damping: Tensor) -> Inverse:
    """Returns the inverse of matrix + damping * I by Cholesky, in the dtype of the matrix (float32 or float64).

    matrix [D, D] symmetric; damping 0-d. Reads two flags back to the host, once per refresh of a factor.
    """
    damped = matrix.clone()
    damped.diagonal().add_(damping)
    if not bool(torch.isfinite(damped).all()):
        return Inverse(None, Ending.NON_FINITE)
    triangle, info = torch.linalg.cholesky_ex(damped)
    if int(info) != 0:
        return Inverse(None, Ending.NOT_POSITIVE_DEFINITE)
    value = torch.cholesky_inverse(triangle)
    if not bool(torch.isfinite(value).all()):
        return Inverse(None, Ending.NOT_POSITIVE_DEFINITE)
    return Inverse(value, Ending.OK)
