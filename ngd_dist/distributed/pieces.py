"""Pieces of mean gradients on their way to the holders of a layer, and pieces of directions on their way back.

An engine that shards leaves each rank one range of each flattened parameter; those of all ranks don't overlap.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ngd_dist.distributed.comm import Communicator
from ngd_dist.distributed.exchange import begin_exchange
from ngd_dist.distributed.placement import Placement
from ngd_dist.factors.codec import Field

__all__ = ["LayerParts", "Pieces", "Range", "shares_of_layers"]

Range = tuple[int, int]  # the beginning in a flattened parameter, and the length
NOTHING: Range = (0, 0)
DIRECTION = "direction to "


@dataclass(frozen=True, slots=True)
class LayerParts:
    """The parameters of one layer: names, shapes, and the way from their tensors to [B, O, I] and back."""

    names: Sequence[str]
    shapes: Sequence[torch.Size]
    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], list[Tensor]]


def shares_of_layers(parts: Mapping[str, LayerParts], ranges: Sequence[Mapping[str, Range]]) -> dict[str, list[int]]:
    """Returns, by layer, the numbers of its parameters that each rank has. ranges: by rank, of parameters by name."""
    return {
        layer: [sum(of_rank.get(name, NOTHING)[1] for name in of_layer.names) for of_rank in ranges]
        for layer, of_layer in parts.items()
    }


class Pieces:
    """Routes of pieces: a pure function of the placement and of the ranges that all ranks know.

    ranges: by rank, the range of each parameter that the rank has a piece of. dtype: that of pieces on their way.
    """

    def __init__(
        self,
        comm: Communicator,
        placement: Placement,
        parts: Mapping[str, LayerParts],
        ranges: Sequence[Mapping[str, Range]],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._comm = comm
        self._roles = placement.roles
        self._placement = placement
        self._parts = parts
        self._ranges = ranges
        self._lengths = shares_of_layers(parts, ranges)
        self._dtype = dtype
        self._device = device

    def lengths(self, layer: str) -> list[int]:
        """Returns the length of this rank's piece of each parameter of the layer; 0 if it has none."""
        return [self._range(self._comm.rank, name)[1] for name in self._parts[layer].names]

    def gather(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Collective. Returns grad_BOI of each layer that this rank holds.

        gradients: this rank's pieces by name of the parameter, [length]; one that is missing counts as zeros.
        """

        def route(source: int, target: int) -> dict[str, Field]:
            return {
                layer: Field((of_ranks[source],), self._dtype)
                for layer, of_ranks in self._lengths.items()
                if of_ranks[source] and target in self._roles[layer].holders
            }

        here = self._comm.rank
        zeros = torch.zeros((), dtype=self._dtype, device=self._device)
        sent = {
            layer: torch.cat(
                [
                    gradients[name].to(self._dtype) if name in gradients else zeros.expand(self._range(here, name)[1])
                    for name in self._parts[layer].names
                ]
            )
            for layer, of_ranks in self._lengths.items()
            if of_ranks[here]
        }
        from_ranks = begin_exchange(
            self._comm, "pieces of gradients", route, sent, self._device, kind="gradients"
        ).wait()
        held = (layer for layer in self._parts if here in self._roles[layer].holders)
        return {layer: self._joined(layer, from_ranks) for layer in held}

    def fields(self, source: int, target: int) -> dict[tuple[str, str], Field]:
        """Returns the fields of directions that one rank sends to another."""
        return {
            (layer, f"{DIRECTION}{target}"): Field((of_ranks[target],), self._dtype)
            for layer, of_ranks in self._lengths.items()
            if of_ranks[target] and self._supplier(layer, target) == source
        }

    def outgoing(self, directions: Mapping[str, Tensor]) -> dict[tuple[str, str], Tensor]:
        """Returns the tensors of those fields that this rank sends, from the directions of layers that it holds."""
        sent: dict[tuple[str, str], Tensor] = {}
        for layer, direction_BOI in directions.items():
            flat = [part.flatten() for part in self._parts[layer].split(direction_BOI)]
            for target, length in enumerate(self._lengths[layer]):
                if length and self._supplier(layer, target) == self._comm.rank:
                    ranges = [self._range(target, name) for name in self._parts[layer].names]
                    cuts = [of_one[start : start + size] for of_one, (start, size) in zip(flat, ranges, strict=True)]
                    sent[layer, f"{DIRECTION}{target}"] = torch.cat(cuts).to(self._dtype)
        return sent

    def incoming(self, from_ranks: Sequence[Mapping[tuple[str, str], Tensor]]) -> dict[str, Tensor]:
        """Returns, by layer, this rank's pieces of the directions of its parameters, one after another."""
        kind, nothing = f"{DIRECTION}{self._comm.rank}", torch.zeros(0, dtype=self._dtype, device=self._device)
        arrived = {
            layer: piece for from_rank in from_ranks for (layer, name), piece in from_rank.items() if name == kind
        }
        return {layer: arrived.get(layer, nothing) for layer in self._parts}

    def _joined(self, layer: str, from_ranks: Sequence[Mapping[str, Tensor]]) -> Tensor:
        parts = self._parts[layer]
        whole = [torch.zeros(shape.numel(), dtype=self._dtype, device=self._device) for shape in parts.shapes]
        for rank, from_rank in enumerate(from_ranks):
            if layer in from_rank:
                ranges = [self._range(rank, name) for name in parts.names]
                pieces = from_rank[layer].split([length for _, length in ranges])
                for flat, piece, (start, length) in zip(whole, pieces, ranges, strict=True):
                    flat[start : start + length] = piece
        return parts.join([flat.view(shape) for flat, shape in zip(whole, parts.shapes, strict=True)])

    def _range(self, rank: int, name: str) -> Range:
        return self._ranges[rank].get(name, NOTHING)

    def _supplier(self, layer: str, target: int) -> int:
        return target if target in self._roles[layer].holders else self._placement.supplier(layer, target)
