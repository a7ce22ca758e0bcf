"""Which rank owns which layer: a pure function of costs and world size, the same on every rank."""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Placement", "longest_first"]


@dataclass(frozen=True, slots=True)
class Placement:
    """Owners of each layer. One owner today; a tuple, since a layer may have several."""

    world_size: int
    owners_by_layer: Mapping[str, tuple[int, ...]]

    def owners(self, layer: str) -> tuple[int, ...]:
        """Returns the ranks that refresh and precondition the layer; the first one's reports count."""
        return self.owners_by_layer[layer]

    def owned(self, rank: int) -> list[str]:
        """Returns the layers that this rank owns, in registration order."""
        return [layer for layer, owners in self.owners_by_layer.items() if rank in owners]


def longest_first(costs: Mapping[str, int], world_size: int) -> Placement:
    """Returns a placement by longest processing time first: the dearest layer goes to the least loaded rank.

    Ties are broken by name and by rank, so that every rank computes the same answer. Source: [G69].
    """
    load = [0] * world_size
    owner: dict[str, int] = {}
    for layer in sorted(costs, key=lambda name: (-costs[name], name)):
        rank = min(range(world_size), key=lambda r: (load[r], r))
        owner[layer] = rank
        load[rank] += costs[layer]
    return Placement(world_size, {layer: (owner[layer],) for layer in costs})
