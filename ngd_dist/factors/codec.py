"""Codecs: the fields in which a tensor crosses the network, and their rounding."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["AsItIs", "Codec", "Copied", "Field", "OverPowerOfTwo"]

LARGEST = 14  # the exponent of the largest entry after scaling: below float16's 15, so that rounding can't overflow


class Field(NamedTuple):
    """The shape and dtype of one tensor on its way. Sender and receiver each compute it; it does not travel."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Returns the bytes of its numbers."""
        return prod(self.shape) * self.dtype.itemsize


class Codec(ABC):
    """Encodes one tensor for its way. fields: the tensors that are sent for it."""

    fields: tuple[Field, ...]

    @abstractmethod
    def encode(self, value: Tensor) -> tuple[Tensor, ...]:
        """Returns the tensors of the fields; other dtypes are converted when they are sent."""

    @abstractmethod
    def decode(self, tensors: Sequence[Tensor]) -> Tensor:
        """Returns the value from the tensors of the fields. It may be a view of them."""


class AsItIs(Codec):
    """A tensor of this shape and dtype, sent as one field."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.fields = (Field(shape, dtype),)

    def encode(self, value: Tensor) -> tuple[Tensor, ...]:
        return (value,)

    def decode(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0]


class Copied(AsItIs):
    """Decodes to a copy: a received buffer must not live as long as a cache."""

    def decode(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].clone()


class OverPowerOfTwo(Codec):
    """A flat tensor in 16 bits, over a power of two that brings its largest entry near 2^14.

    In float16 an entry is lost if it is 2^39 times smaller than the largest; damping covers that.
    """

    def __init__(self, numbers: int, exact: torch.dtype, dtype: torch.dtype) -> None:
        """Decodes to the `exact` dtype; `dtype`: the one of 16 bits."""
        self.fields = (Field((1,), torch.float32), Field((numbers,), dtype))
        self._exact = exact
        self._dtype = dtype

    def encode(self, value: Tensor) -> tuple[Tensor, ...]:
        scale = _power_of_two(value.abs().amax())
        return scale.view(1), (value / scale).to(self._dtype)

    def decode(self, tensors: Sequence[Tensor]) -> Tensor:
        scale, rounded = tensors
        return rounded.to(self._exact) * scale


def _power_of_two(largest: Tensor) -> Tensor:
    """Returns the power of two over which `largest` is at most 2^LARGEST; if it is not finite, itself."""
    _, exponent = torch.frexp(largest)
    scale = torch.exp2((exponent - LARGEST).clamp(min=-126).to(largest))  # not below float32's normal numbers
    return torch.where(torch.isfinite(largest), scale, largest)
