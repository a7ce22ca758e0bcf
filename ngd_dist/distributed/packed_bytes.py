"""Tensors of known shapes and dtypes as one run of bytes, so that one collective carries them all."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ngd_dist.factors.codec import Field

__all__ = ["pack_bytes", "packed_nbytes", "unpack_bytes"]

ALIGNMENT = 8  # bytes: where a tensor of any dtype may begin


def packed_nbytes(fields: Sequence[Field]) -> int:
    """Returns the length of the run of bytes."""
    return sum(_aligned(field.nbytes) for field in fields)


def pack_bytes(fields: Sequence[Field], tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Returns the tensors, converted to the dtypes of their fields, as [bytes] in uint8."""
    packed = torch.zeros(packed_nbytes(fields), dtype=torch.uint8, device=device)
    for view, tensor in zip(unpack_bytes(fields, packed), tensors, strict=True):
        view.copy_(tensor)
    return packed


def unpack_bytes(fields: Sequence[Field], packed: Tensor) -> list[Tensor]:
    """Returns the tensors of a run of bytes, as views of it."""
    views = []
    start = 0
    for field in fields:
        views.append(packed[start : start + field.nbytes].view(field.dtype).view(field.shape))
        start += _aligned(field.nbytes)
    return views


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
