"""Each layer has one owner: statistics and gradients are reduced to it, and its direction is gathered by all.

Ranks are data-parallel until the gradients are there and layer-parallel from then on: SP-NGD's stages 3 to 5
([OT20]), with directions gathered instead of weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ngd_dist.statistics import Key
from ngd_dist.strategies.base import (
    REPORT_NUMBERS,
    Collected,
    Findings,
    Local,
    Report,
    Strategy,
    collected,
    split_like,
    split_shapes,
)

__all__ = ["OwnerSharded"]

NON_FINITE = Key("", "non-finite")


@dataclass(frozen=True, slots=True)
class _Part:
    """What one rank publishes: directions of its layers, what others need of its caches, reports, inner products."""

    layers: list[str]
    shared: list[tuple[str, str]]
    keys: list[Key]
    shapes: list[tuple[int, ...]]

    @property
    def numbers(self) -> int:
        return sum(prod(shape) for shape in self.shapes)


class OwnerSharded(Strategy):
    """Buffers are rank-major: one part per rank with what its layers need, padded to the longest part."""

    is_replicated = False

    def holds(self, layer: str) -> bool:
        return self.comm.rank in self.placement.owners(layer)

    def collect(self, local: Local) -> Collected:
        sums = self._reduce("statistics", local.due, self.wire_dtype)
        gradients, plain, scale = local.gradients, local.plain, self.gradient_scale
        travelling = {Key(layer, "tally"): tally for layer, tally in local.tallies.items()}
        non_finite = local.non_finite
        if scale is not None:
            travelling |= {NON_FINITE: non_finite}
            travelling |= {Key(layer, "gradient"): gradient for layer, gradient in gradients.items()}
        own = self._reduce("gradients", travelling, self.dtype)
        tallies = {key.layer: total for key, total in own.items() if key.statistic == "tally"}
        if scale is not None:
            # What DDP has averaged is finite on all ranks or on none; else every rank gets the sum in its part.
            non_finite = own[NON_FINITE]
            gradients = {key.layer: total * scale for key, total in own.items() if key.statistic == "gradient"}
            plain = self._combine(plain, scale)
        held = {layer: gradient for layer, gradient in gradients.items() if self.holds(layer)}
        return collected(non_finite, sums, tallies, held, plain)

    def publish(self, findings: Findings, due: Sequence[Key]) -> Findings:
        """Reports, inner products and shared cache entries ride behind each owner's directions."""
        parts = [self._part(rank, due, findings.inner) for rank in range(self.comm.world_size)]
        longest = max(part.numbers for part in parts)
        own = self._tensors(parts[self.comm.rank], findings)
        buffer = self.comm.all_gather("directions", self.flatten(own, self.dtype, longest), kind="directions")

        inner = torch.zeros_like(findings.inner)
        whole = Findings({}, {}, inner, {})
        for part, numbers in zip(parts, buffer.view(len(parts), longest), strict=True):
            tensors = iter(split_shapes(numbers, part.shapes))
            for layer in part.layers:
                whole.directions[layer] = next(tensors)
            for layer, name in part.shared:
                entry = next(tensors)
                if name == _IS_THERE:
                    whole.shared[layer] = {} if bool(entry) else None  # one host read per rebuilt basis
                elif (cache := whole.shared[layer]) is not None:
                    cache[name] = entry.clone()  # the buffer must not live as long as the cache
            rows = next(tensors).tolist()
            whole.reports.update({key: Report.parse(row) for key, row in zip(part.keys, rows, strict=True)})
            inner += next(tensors)
        return whole

    def _part(self, rank: int, due: Sequence[Key], inner: Tensor) -> _Part:
        layers = [layer for layer in self.shapes.gradients if self.placement.owners(layer)[0] == rank]
        keys = [key for key in due if self.placement.owners(key.layer)[0] == rank]
        shared = [
            (layer, name)
            for layer in dict.fromkeys(key.layer for key in keys)
            if self.shapes.shared[layer]
            for name in (_IS_THERE, *self.shapes.shared[layer])
        ]
        shapes = [
            *(self.shapes.gradients[layer] for layer in layers),
            *((1,) if name == _IS_THERE else self.shapes.shared[layer][name] for layer, name in shared),
            (len(keys), REPORT_NUMBERS),
            tuple(inner.shape),
        ]
        return _Part(layers, shared, keys, shapes)

    def _tensors(self, part: _Part, findings: Findings) -> list[Tensor]:
        """Returns what this rank sends, in the order of the part's shapes."""
        tensors = [findings.directions[layer] for layer in part.layers]
        for layer, name in part.shared:
            cache = findings.shared[layer]
            if name == _IS_THERE:
                tensors.append(torch.full((1,), float(cache is not None), device=self.device))
            else:
                shape = self.shapes.shared[layer][name]
                tensors.append(torch.zeros(shape, device=self.device) if cache is None else cache[name])
        numbers = [findings.reports[key].numbers() for key in part.keys]
        reports = torch.tensor(numbers, dtype=self.dtype, device=self.device).view(-1, REPORT_NUMBERS)
        return [*tensors, reports, findings.inner]

    def _reduce(self, name: str, tensors: Mapping[Key, Tensor], dtype: torch.dtype) -> dict[Key, Tensor]:
        """Returns the sums over ranks of those tensors whose layer this rank owns."""
        if not tensors:
            return {}
        owned: list[list[Key]] = [[] for _ in range(self.comm.world_size)]
        for key in tensors:
            everyone = range(self.comm.world_size)
            for rank in everyone if key == NON_FINITE else self.placement.owners(key.layer):
                owned[rank].append(key)
        longest = max(sum(tensors[key].numel() for key in keys) for keys in owned)
        parts = [self.flatten([tensors[key] for key in keys], dtype, longest) for keys in owned]
        own = self.comm.reduce_scatter(name, torch.cat(parts), kind=name).to(self.dtype)
        keys = owned[self.comm.rank]
        return dict(zip(keys, split_like(own, [tensors[key] for key in keys]), strict=True))

    def _combine(self, plain: list[Tensor], scale: float) -> list[Tensor]:
        if not plain:
            return []
        buffer = self.flatten(plain, self.dtype)
        self.comm.all_reduce("plain gradients", buffer, kind="gradients")
        return split_like(buffer.mul_(scale), plain)


_IS_THERE = "is there"
