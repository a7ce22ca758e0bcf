"""Symmetric matrices by their upper triangles, row by row: n (n + 1) / 2 numbers; and their codecs.

Second moments span more powers of ten than 16 bits do, and their diagonal decides the damping. Inverses arrive to the
bit as their owner applies them, since every holder's direction moves the same weights.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ngd_dist.factors.codec import Codec, Field
from ngd_dist.factors.storage import Stored, store

__all__ = ["OverDiagonal", "StoredTriangle", "Triangle", "pack", "packed_size", "unpack"]


def packed_size(n: int) -> int:
    """Returns the count of numbers in the packed triangle of an n x n matrix."""
    return n * (n + 1) // 2


def pack(matrix: Tensor) -> Tensor:
    """Returns the upper triangles of symmetric [..., n, n] matrices, row by row, as [..., n (n + 1) / 2]."""
    packed: Tensor = matrix.flatten(-2).index_select(-1, _triangle(matrix.shape[-1], matrix.device))
    return packed


def unpack(triangle: Tensor, n: int) -> Tensor:
    """Returns the symmetric [..., n, n] matrices of packed upper triangles."""
    # One gather takes a fourth of the time of copying the upper half and its transpose.
    whole: Tensor = triangle.index_select(-1, _places(n, triangle.device)).unflatten(-1, (n, n))
    return whole


class OverDiagonal(Codec):
    """Packed second moments X of some blocks: the diagonal d in float32, and X_ij / sqrt(d_i d_j) in 16 bits.

    The latter lies in [-1, 1] because X is a second moment. Each entry is then off by at most u |X_ij|, u = 2^-11 in
    float16 and 2^-8 in bfloat16, and in float16 by at most 2^-25 sqrt(d_i d_j) if that is more.
    """

    def __init__(self, blocks: int, n: int, exact: torch.dtype, dtype: torch.dtype) -> None:
        """Decodes to the `exact` dtype; `dtype`: the one of 16 bits."""
        self.fields = (Field((blocks, n), torch.float32), Field((blocks, packed_size(n) - n), dtype))
        self._n = n
        self._exact = exact
        self._dtype = dtype

    def encode(self, value: Tensor) -> tuple[Tensor, ...]:
        triangle = value.view(-1, packed_size(self._n))
        diagonal, rest, rows, columns = _positions(self._n, value.device)
        d = triangle.index_select(1, diagonal)
        root = d.clamp(min=0).rsqrt().nan_to_num(posinf=0.0)  # a zero on the diagonal makes its row zero
        scaled = triangle.index_select(1, rest) * root.index_select(1, rows) * root.index_select(1, columns)
        return d, scaled.to(self._dtype)

    def decode(self, tensors: Sequence[Tensor]) -> Tensor:
        d, rounded = tensors[0], tensors[1].to(self._exact)
        diagonal, rest, rows, columns = _positions(self._n, rounded.device)
        root = d.clamp(min=0).sqrt()
        triangle = rounded.new_empty(len(rounded), packed_size(self._n))
        triangle.index_copy_(1, diagonal, d)
        triangle.index_copy_(1, rest, rounded * root.index_select(1, rows) * root.index_select(1, columns))
        return triangle.flatten()


class Triangle(Codec):
    """Symmetric matrices [..., n, n], packed."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.fields = (Field((*shape[:-2], packed_size(shape[-1])), dtype),)
        self._n = shape[-1]

    def encode(self, value: Tensor) -> tuple[Tensor, ...]:
        return (pack(value),)

    def decode(self, tensors: Sequence[Tensor]) -> Tensor:
        return unpack(tensors[0], self._n)


class StoredTriangle(Codec):
    """Positive definite inverses [B, n, n] in the 16 bits of a cache: see `storage.store`."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, kept: torch.dtype) -> None:
        """Decodes to `dtype`; `kept`: the one of 16 bits."""
        scale = (Field(shape[:-1], dtype),) if kept == torch.float16 else ()
        self.fields = (Field((*shape[:-2], packed_size(shape[-1])), kept), *scale)
        self._n = shape[-1]
        self._dtype = dtype
        self._kept = kept

    def encode(self, value: Tensor) -> tuple[Tensor, ...]:
        stored = store(value, self._kept)  # of an inverse that was stored before, which changes nothing
        triangle = pack(stored.value)
        return (triangle,) if stored.scale is None else (triangle, stored.scale)

    def decode(self, tensors: Sequence[Tensor]) -> Tensor:
        scale = tensors[1] if len(tensors) > 1 else None
        return Stored(unpack(tensors[0], self._n), scale, self._dtype).load()


@lru_cache(maxsize=256)
def _triangle(n: int, device: torch.device) -> Tensor:
    """Returns the place in a flat n x n matrix of each number of its packed triangle: int32 [n (n + 1) / 2]."""
    rows, columns = torch.triu_indices(n, n, device=device)
    index: Tensor = rows * n + columns
    return index.int()


@lru_cache(maxsize=256)
def _places(n: int, device: torch.device) -> Tensor:
    """Returns the place in its packed triangle of each number of a flat symmetric n x n matrix: int32 [n n]."""
    places = torch.empty(n, n, dtype=torch.int32, device=device)
    rows, columns = torch.triu_indices(n, n, device=device)
    packed = torch.arange(len(rows), dtype=torch.int32, device=device)
    places[rows, columns] = packed
    places[columns, rows] = packed
    return places.flatten()


@lru_cache(maxsize=64)
def _positions(n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the places of the diagonal and of the rest in a packed triangle, and the rows and columns of the rest."""
    rows, columns = torch.triu_indices(n, n, device=device)
    is_diagonal = rows == columns
    rest = (~is_diagonal).nonzero().flatten()
    return is_diagonal.nonzero().flatten(), rest, rows[rest], columns[rest]
