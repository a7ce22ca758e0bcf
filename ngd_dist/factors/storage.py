"""Inverses in 16 bits between their uses: half the memory, for an error of 2^-8 or 2^-11 of each entry."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["InverseDtype", "Stored", "store"]

InverseDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class Stored:
    """scale_i value_ij scale_j, in the original dtype. scale: [B, n]; None if the 16 bits have the range of float32.

    By Cauchy and Schwarz no entry of a positive definite matrix exceeds the root of the product of its two diagonal
    entries. With these roots as scales, up to a power of two, float16 neither overflows nor loses a small row.
    """

    value: Tensor
    scale: Tensor | None
    dtype: torch.dtype

    def load(self) -> Tensor:
        """Returns the inverse, [B, n, n]."""
        value = self.value.to(self.dtype)
        return value if self.scale is None else value * (self.scale.unsqueeze(-1) * self.scale.unsqueeze(-2))


def store(inverse: Tensor, dtype: torch.dtype) -> Stored:
    """Returns a positive definite inverse, [B, n, n], rounded to a 16-bit dtype. Storing it again changes nothing."""
    if dtype != torch.float16:
        return Stored(inverse.to(dtype), None, inverse.dtype)
    diagonal = inverse.diagonal(dim1=-2, dim2=-1)
    exponent = torch.frexp(diagonal.where(diagonal > 0, 1)).exponent // 2
    scale = torch.ldexp(torch.ones_like(diagonal), exponent)
    scaled = inverse * (1 / scale.unsqueeze(-1) / scale.unsqueeze(-2))
    return Stored(scaled.to(dtype), scale, inverse.dtype)
