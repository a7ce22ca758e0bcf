"""Inverses in 16 bits while they wait to be applied: half of what they take, for 2^-8 or 2^-11 of each entry."""

from collections.abc import Collection, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Cache", "Caches", "InverseDtype", "Stored", "store"]

Cache = dict[str, Tensor]
InverseDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class Stored:
    """scale_i value_ij scale_j, in the dtype that it came in. scale [B, n]; None where the range is float32's.

    By Cauchy and Schwarz no entry of a positive definite matrix exceeds the root of its two diagonal entries: with that
    for a scale, up to a power of two, nothing overflows float16, and a row that is small is not lost.
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


class Caches(MutableMapping[str, Cache | None]):
    """A cache by layer; None while a layer has none. Those entries that are dense inverses are kept in 16 bits.

    Each look at a layer whose inverses are rounded makes them anew, O(n^2); `has` does not.

    inverses: the names of each layer's dense inverses. dtype: theirs; float32: they are kept as they are.
    shared: the names of each layer's entries that estimating its statistics reads, on all ranks.
    """

    def __init__(
        self,
        inverses: Mapping[str, Collection[str]],
        dtype: InverseDtype = "float32",
        shared: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        self._shared = shared or {}
        # The shared entries of layers whose cache is not here.
        self.elsewhere: dict[str, Cache | None] = {}
        self._inverses = inverses
        self._dtype: torch.dtype | None = None if dtype == "float32" else getattr(torch, dtype)
        self._caches: dict[str, dict[str, Tensor | Stored] | None] = dict.fromkeys(inverses)

    def has(self, layer: str) -> bool:
        """Returns whether the layer has a cache."""
        return self._caches[layer] is not None

    def shared_of(self, layer: str) -> Cache:
        """Returns the entries of the layer's cache that `estimate` reads; empty before the first refresh."""
        entries = self._shared.get(layer, ())
        source = (self[layer] or self.elsewhere.get(layer) or {}) if entries else {}
        return {entry: source[entry] for entry in entries if entry in source}

    def __getitem__(self, layer: str) -> Cache | None:
        cache = self._caches[layer]
        if cache is None:
            return None
        return {name: entry.load() if isinstance(entry, Stored) else entry for name, entry in cache.items()}

    def __setitem__(self, layer: str, cache: Cache | None) -> None:
        if cache is None or self._dtype is None:
            self._caches[layer] = None if cache is None else dict(cache)
            return
        rounded = self._inverses[layer]
        self._caches[layer] = {
            name: store(entry, self._dtype) if name in rounded else entry for name, entry in cache.items()
        }

    def __delitem__(self, layer: str) -> None:
        del self._caches[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._caches)

    def __len__(self) -> int:
        return len(self._caches)
