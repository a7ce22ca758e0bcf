"""How an entry of a cache crosses the network: an inverse as a triangle, in the 16 bits that it may be kept in.

What arrives is to the bit what its owner applies, since every holder's direction moves the same weights.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ngd_dist.distributed.base import Cargo
from ngd_dist.distributed.parcel import Field
from ngd_dist.factors.storage import InverseDtype, Stored, store
from ngd_dist.statistics.statistic import pack, packed_size, unpack

__all__ = ["Entries", "Part"]

# A layer; an entry of its cache, or what else a rank sends for it; and a part of that, as a rule its only one: "".
Part = tuple[str, str, str]


class Entries:
    """The entries of all layers' caches. dtype: that which inverses are kept in, where it is not the layer's own."""

    def __init__(self, cargo: Mapping[str, Cargo], dtype: InverseDtype) -> None:
        self._cargo = cargo
        self._dtype: torch.dtype | None = None if dtype == "float32" else getattr(torch, dtype)

    def fields(self, layer: str, entry: str) -> dict[Part, Field]:
        """Returns what the parcel of an entry is made of."""
        shape, dtype = self._cargo[layer].cache[entry]
        if entry not in self._cargo[layer].symmetric:
            return {(layer, entry, ""): Field(shape, dtype)}
        fields = {(layer, entry, ""): Field((*shape[:-2], packed_size(shape[-1])), self._dtype or dtype)}
        if self._dtype == torch.float16:
            fields[layer, entry, "scale"] = Field(shape[:-1], dtype)
        return fields

    def encode(self, layer: str, entry: str, value: Tensor) -> dict[Part, Tensor]:
        """Returns the tensors of those fields."""
        if entry not in self._cargo[layer].symmetric:
            return {(layer, entry, ""): value}
        if self._dtype is None:
            return {(layer, entry, ""): pack(value)}
        stored = store(value, self._dtype)  # of what was stored before, which changes nothing
        tensors = {(layer, entry, ""): pack(stored.value)}
        return tensors if stored.scale is None else tensors | {(layer, entry, "scale"): stored.scale}

    def decode(self, layer: str, entry: str, tensors: Mapping[Part, Tensor]) -> Tensor:
        """Returns the entry, in memory of its own: what it arrived in must not live as long as the cache."""
        shape, dtype = self._cargo[layer].cache[entry]
        value = tensors[layer, entry, ""]
        if entry not in self._cargo[layer].symmetric:
            return value.clone()
        return Stored(unpack(value, shape[-1]), tensors.get((layer, entry, "scale")), dtype).load()
