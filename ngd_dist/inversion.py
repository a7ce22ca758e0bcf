"""Inverse of one damped factor. How it went is part of the result; nothing is printed or raised."""

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["Ending", "Inverse", "invert"]


class Ending(IntEnum):
    """How a refresh of a factor ended. The integer is what travels between ranks."""

    OK = 0
    NON_FINITE = 1
    NOT_POSITIVE_DEFINITE = 2
    INACCURATE = 3

    @property
    def advice(self) -> str:
        """Returns the likely cause and what to try, as one sentence."""
        return _ADVICE[self]


_ADVICE = {
    Ending.OK: "",
    Ending.NON_FINITE: "the statistic has NaN or infinity: the loss diverged, or activations overflowed; lower lr",
    Ending.NOT_POSITIVE_DEFINITE: "the damped factor is not positive definite in its precision; raise damping",
    Ending.INACCURATE: "the inverse leaves too large a residual: the factor is too ill-conditioned; raise damping",
}

# ||I - X inverse||_F / sqrt(n) above which an inverse is not used: a direction could be off by as much.
MAX_RESIDUAL = 0.05
PROBES = 4


@dataclass(frozen=True, slots=True)
class Inverse:
    """The inverse where there is one, how the inversion ended, and ||I - X inverse||_F / sqrt(n), estimated."""

    value: Tensor | None
    ending: Ending
    residual: float = float("nan")


def invert(matrix: Tensor, damping: Tensor) -> Inverse:
    """Returns the inverse of matrix + damping * I by Cholesky, in the dtype of the matrix (float32 or float64).

    matrix [D, D] symmetric; damping 0-d. Reads three numbers back to the host, once per refresh of a factor.
    """
    damped = matrix.clone()
    damped.diagonal().add_(damping)
    if not bool(torch.isfinite(damped).all()):
        return Inverse(None, Ending.NON_FINITE)
    triangle, info = torch.linalg.cholesky_ex(damped)
    if int(info) != 0:
        return Inverse(None, Ending.NOT_POSITIVE_DEFINITE)
    value = torch.cholesky_inverse(triangle)
    residual = _residual(damped, value)
    if not residual <= MAX_RESIDUAL:
        return Inverse(None, Ending.INACCURATE, residual)
    return Inverse(value, Ending.OK, residual)


def _residual(matrix: Tensor, inverse: Tensor) -> float:
    """Returns ||V - X (inverse V)||_F / ||V||_F for a few random columns V: O(n^2), where the full product is O(n^3).

    Its square has the mean ||I - X inverse||_F^2 / n.
    """
    probes = _probes(matrix.shape[0], matrix.dtype, matrix.device)
    return float(torch.linalg.vector_norm(probes - matrix @ (inverse @ probes)) / torch.linalg.vector_norm(probes))


@lru_cache(maxsize=256)
def _probes(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(n)  # the same columns on every rank and device
    return torch.randn(n, PROBES, generator=generator, dtype=torch.float64).to(device, dtype)
