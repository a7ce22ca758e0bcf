"""How the value of a statistic crosses the network: whole, or in 16 bits with its diagonal in 32.

Second moments span more powers of ten than 16 bits do, and what is on the diagonal decides the damping: so a symmetric
matrix X travels in 16 bits as its diagonal d in float32 and X_ij / sqrt(d_i d_j), which lies in [-1, 1] because X is a
second moment. Each entry is then off by at most u |X_ij|, u = 2^-11 in float16 and 2^-8 in bfloat16, and in float16 by
at most 2^-25 sqrt(d_i d_j) where that is more. A statistic with a value per entry of the gradient (EKFAC's S) travels
over a power of two that brings its largest entry near 2^14; in float16 what is 2^39 times smaller than the largest is
lost, which damping covers. Vectors of second moments travel whole: they are short.
"""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from ngd_dist.distributed.parcel import Field, parcel_size
from ngd_dist.statistics.statistic import Key, StatisticSpec, packed_size

__all__ = ["Item", "Wire"]

Item = tuple[Key, int]  # a statistic, and which of its fields
LARGEST = 14  # the exponent that the largest entry is brought to: below float16's 15, so that rounding can't overflow


class Wire:
    """`exact`: float32 or float64, in which statistics are summed. `dtype`: in which they travel; `exact` too, or 16
    bits. A rank decodes what each other rank sent before it sums, so that a value is rounded once.
    """

    def __init__(self, dtype: torch.dtype, exact: torch.dtype, specs: Mapping[Key, StatisticSpec]) -> None:
        self.dtype = dtype
        self.exact = exact
        self.specs = specs

    def fields(self, keys: Iterable[Key]) -> dict[Item, Field]:
        """Returns what the parcel of these statistics is made of."""
        return {(key, i): field for key in keys for i, field in enumerate(self._fields(self.specs[key]))}

    def nbytes(self, key: Key) -> int:
        """Returns what the parcel of one statistic weighs."""
        return parcel_size(self._fields(self.specs[key]))

    def encode(self, values: Mapping[Key, Tensor]) -> dict[Item, Tensor]:
        """Returns the tensors of those fields from flat values, as `StatisticSpec.flatten` returns them."""
        return {(key, i): tensor for key, flat in values.items() for i, tensor in enumerate(self._encoded(key, flat))}

    def decode(self, key: Key, tensors: Mapping[Item, Tensor]) -> Tensor:
        """Returns the flat value of one statistic, in the exact dtype."""
        spec = self.specs[key]
        first = tensors[key, 0]
        if not self._is_rounded(spec):
            return first
        rounded = tensors[key, 1].to(self.exact)
        if not spec.is_symmetric:
            return rounded * first
        n = spec.shape[-1]
        diagonal, rest, rows, columns = _positions(n, rounded.device)
        root = first.clamp(min=0).sqrt()
        triangle = rounded.new_empty(len(rounded), packed_size(n))
        triangle.index_copy_(1, diagonal, first)
        triangle.index_copy_(1, rest, rounded * root.index_select(1, rows) * root.index_select(1, columns))
        return triangle.flatten()

    def _fields(self, spec: StatisticSpec) -> list[Field]:
        if not self._is_rounded(spec):
            return [Field((spec.numbers,), self.exact)]
        if not spec.is_symmetric:
            return [Field((1,), torch.float32), Field((spec.numbers,), self.dtype)]
        blocks, n = prod(spec.shape[:-2]), spec.shape[-1]
        return [Field((blocks, n), torch.float32), Field((blocks, packed_size(n) - n), self.dtype)]

    def _encoded(self, key: Key, flat: Tensor) -> list[Tensor]:
        spec = self.specs[key]
        if not self._is_rounded(spec):
            return [flat]
        if not spec.is_symmetric:
            scale = _power_of_two(flat.abs().amax())
            return [scale.view(1), (flat / scale).to(self.dtype)]
        n = spec.shape[-1]
        triangle = flat.view(-1, packed_size(n))
        diagonal, rest, rows, columns = _positions(n, flat.device)
        d = triangle.index_select(1, diagonal)
        root = d.clamp(min=0).rsqrt().nan_to_num(posinf=0.0)  # a zero on the diagonal makes its row zero
        scaled = triangle.index_select(1, rest) * root.index_select(1, rows) * root.index_select(1, columns)
        return [d, scaled.to(self.dtype)]

    def _is_rounded(self, spec: StatisticSpec) -> bool:
        return self.dtype.itemsize == 2 and (spec.is_symmetric or len(spec.shape) > 2)


def _power_of_two(largest: Tensor) -> Tensor:
    """Returns the power of two over which `largest` is at most 2^LARGEST; NaN or infinity where it is not finite."""
    _, exponent = torch.frexp(largest)
    scale = torch.exp2((exponent - LARGEST).clamp(min=-126).to(largest))  # not below float32's normal numbers
    return torch.where(torch.isfinite(largest), scale, largest)


@lru_cache(maxsize=64)
def _positions(n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns where a packed triangle has its diagonal and the rest, and the row and the column of each of the rest."""
    rows, columns = torch.triu_indices(n, n, device=device)
    is_diagonal = rows == columns
    rest = (~is_diagonal).nonzero().flatten()
    return is_diagonal.nonzero().flatten(), rest, rows[rest], columns[rest]
