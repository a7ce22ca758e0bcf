"""The caches of all layers: the tensors that a preconditioner makes of its statistics, and applies in every step."""

from collections.abc import Collection, Iterator, Mapping, MutableMapping

import torch
from torch import Tensor

from ngd_dist.factors.form import Form
from ngd_dist.factors.storage import InverseDtype, Stored

__all__ = ["Cache", "Caches"]

Cache = dict[str, Tensor]


class Caches(MutableMapping[str, Cache | None]):
    """A cache by layer; None while a layer has none. Dense inverses may be kept in 16 bits.

    If inverses are rounded, each look at a layer's cache expands them again, O(n^2); `has` does not.

    entries: the forms of each layer's entries. dtype: that of inverses; float32: they are kept as they are.
    shared: the names of each layer's entries that all ranks need to estimate its statistics.
    """

    def __init__(
        self,
        entries: Mapping[str, Mapping[str, Form]],
        dtype: InverseDtype = "float32",
        shared: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        self._shared = shared or {}
        # The shared entries of layers that have their cache on other ranks.
        self.elsewhere: dict[str, Cache | None] = {}
        self._entries = entries
        self._dtype: torch.dtype | None = None if dtype == "float32" else getattr(torch, dtype)
        self._caches: dict[str, dict[str, Tensor | Stored] | None] = dict.fromkeys(entries)

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
        forms, dtype = self._entries[layer], self._dtype
        self._caches[layer] = {name: forms[name].keep(entry, dtype) for name, entry in cache.items()}

    def __delitem__(self, layer: str) -> None:
        del self._caches[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._caches)

    def __len__(self) -> int:
        return len(self._caches)
