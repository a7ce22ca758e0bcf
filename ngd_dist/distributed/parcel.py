"""Tensors of known shapes and dtypes as one run of bytes, so that one collective carries them all."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ngd_dist.factors.codec import Field

__all__ = ["open_parcel", "pack_parcel", "parcel_size"]

ALIGNMENT = 8  # bytes: where a tensor of any dtype may begin


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
