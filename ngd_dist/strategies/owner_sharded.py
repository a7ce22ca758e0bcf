"""Each layer has one owner: statistics and gradients are reduced to it, and its direction is gathered by all.

Ranks are data-parallel until the gradients are there and layer-parallel from then on: SP-NGD's stages 3 to 5
([OT20]), with directions gathered instead of weights.
"""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from ngd_dist.statistics import Key
from ngd_dist.strategies.base import REPORT_NUMBERS, Collected, Local, Report, Strategy, collected, split_like

__all__ = ["OwnerSharded"]


class OwnerSharded(Strategy):
    """Buffers are rank-major: one part per rank with what its layers need, padded to the longest part."""

    def holds(self, layer: str) -> bool:
        return self.comm.rank in self.placement.owners(layer)

    def collect(self, local: Local) -> Collected:
        sums = self._reduce("statistics", local.due, self.wire_dtype)
        gradients, plain, scale = local.gradients, local.plain, self.gradient_scale
        travelling = {Key(layer, "count"): count for layer, count in local.counts.items()}
        if scale is not None:
            travelling |= {Key(layer, "gradient"): gradient for layer, gradient in gradients.items()}
        own = self._reduce("gradients", travelling, self.dtype)
        counts = {key.layer: total for key, total in own.items() if key.statistic == "count"}
        if scale is not None:
            gradients = {key.layer: total * scale for key, total in own.items() if key.statistic == "gradient"}
            plain = self._combine(plain, scale)
        held = {layer: gradient for layer, gradient in gradients.items() if self.holds(layer)}
        return collected(sums, counts, held, plain)

    def publish(
        self, directions: Mapping[str, Tensor], reports: Mapping[Key, Report], due: Sequence[Key]
    ) -> tuple[dict[str, Tensor], dict[Key, Report]]:
        """The reports ride at the end of each owner's part."""
        parts = [self._part(rank, due) for rank in range(self.comm.world_size)]
        layers, keys = parts[self.comm.rank]
        numbers = [number for key in keys for number in reports[key].numbers()]
        tensors = [directions[layer] for layer in layers] + [torch.tensor(numbers, device=self.device)]
        longest = max(self._length(layers, keys) for layers, keys in parts)
        buffer = self.comm.all_gather("directions", self.flatten(tensors, self.dtype, longest), kind="directions")

        gathered: dict[str, Tensor] = {}
        findings: dict[Key, Report] = {}
        for (layers, keys), part in zip(parts, buffer.view(len(parts), longest), strict=True):
            sizes = [prod(self.shapes[layer]) for layer in layers] + [REPORT_NUMBERS * len(keys)]
            *flat, tail = part[: sum(sizes)].split(sizes)
            gathered |= {layer: flat[i].view(self.shapes[layer]) for i, layer in enumerate(layers)}
            rows = tail.view(-1, REPORT_NUMBERS).tolist()
            findings |= {key: Report.parse(row) for key, row in zip(keys, rows, strict=True)}
        return gathered, findings

    def _part(self, rank: int, due: Sequence[Key]) -> tuple[list[str], list[Key]]:
        """Returns the layers whose directions, and the keys whose reports, this rank sends."""
        layers = [layer for layer in self.shapes if self.placement.owners(layer)[0] == rank]
        return layers, [key for key in due if self.placement.owners(key.layer)[0] == rank]

    def _length(self, layers: Sequence[str], keys: Sequence[Key]) -> int:
        return sum(prod(self.shapes[layer]) for layer in layers) + REPORT_NUMBERS * len(keys)

    def _reduce(self, name: str, tensors: Mapping[Key, Tensor], dtype: torch.dtype) -> dict[Key, Tensor]:
        """Returns the sums over ranks of those tensors whose layer this rank owns."""
        if not tensors:
            return {}
        owned: list[list[Key]] = [[] for _ in range(self.comm.world_size)]
        for key in tensors:
            for rank in self.placement.owners(key.layer):
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
