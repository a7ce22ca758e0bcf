"""Tensors of known shapes and dtypes as one run of bytes, so that one collective carries them all."""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Field", "open_parcel", "pack_parcel", "parcel_size"]

ALIGNMENT = 8  # bytes: where a tensor of any dtype may begin


class Field(NamedTuple):
    """One tensor of a parcel. Sender and receiver work it out for themselves; it does not travel."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Returns the bytes of its numbers."""
        return prod(self.shape) * self.dtype.itemsize


def parcel_size(fields: Sequence[Field]) -> int:
    """Returns the bytes of the parcel."""
    return sum(_aligned(field.nbytes) for field in fields)


def pack_parcel(fields: Sequence[Field], tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Returns the tensors, converted to the dtypes of their fields, as [bytes] in uint8."""
    parcel = torch.zeros(parcel_size(fields), dtype=torch.uint8, device=device)
    for part, tensor in zip(open_parcel(fields, parcel), tensors, strict=True):
        part.copy_(tensor)
    return parcel


def open_parcel(fields: Sequence[Field], parcel: Tensor) -> list[Tensor]:
    """Returns the tensors of a parcel, as views of it."""
    views = []
    start = 0
    for field in fields:
        views.append(parcel[start : start + field.nbytes].view(field.dtype).view(field.shape))
        start += _aligned(field.nbytes)
    return views


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
