"""The owner of each layer: the rule, for training and for the planner, which imports no torch."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TypeVar

from ngd_dist.config import AllReduce, NGDConfig, OwnerSharded, Single

__all__ = ["Owners", "least_loaded", "owners_of", "strategy_of"]

Cost = TypeVar("Cost", int, float)


@dataclass(frozen=True, slots=True)
class Owners:
    """The owner of each layer, and the number of ranks that hold it, the owner and those that follow it.

    everywhere: the layers that all ranks refresh; small: those of them whose statistics go with the gradients.
    """

    world_size: int
    owner: Mapping[str, int]
    num_holders: Mapping[str, int]
    everywhere: frozenset[str]
    small: frozenset[str]

    def holders(self, layer: str) -> Sequence[int]:
        """Returns the ranks that hold the layer, its owner first."""
        return [(self.owner[layer] + i) % self.world_size for i in range(self.num_holders[layer])]

    def sums(self, sizes: Mapping[str, int]) -> Counter[int]:
        """Returns the sum of the sizes, by layer, of each owner that has any."""
        of_owner: Counter[int] = Counter()
        for layer, size in sizes.items():
            of_owner[self.owner[layer]] += size
        return of_owner

    def inverters(self, layer: str) -> Sequence[int]:
        """Returns the ranks that refresh the layer's cache."""
        return range(self.world_size) if layer in self.everywhere else (self.owner[layer],)

    def inverts(self, layer: str, rank: int) -> bool:
        """Returns whether the rank keeps the layer's statistics and refreshes its cache."""
        return layer in self.everywhere or self.owner[layer] == rank

    def holds(self, layer: str, rank: int) -> bool:
        """Returns whether the rank has the layer's cache and applies it."""
        return (rank - self.owner[layer]) % self.world_size < self.num_holders[layer]


def strategy_of(config: NGDConfig, world_size: int) -> Single | AllReduce | OwnerSharded:
    """Returns the strategy, with the default filled in."""
    return config.strategy or (Single() if world_size == 1 else OwnerSharded())


def least_loaded(
    costs: Mapping[str, Cost], load: list[Cost], shares: Mapping[str, Sequence[int]] | None = None
) -> dict[str, int]:
    """Returns the owners: the most expensive layer goes first, to the rank that has least to do. Source: [G69].

    costs: the operations of refreshing each layer, or its seconds. load: those that each rank has already; it grows in
    place. Ties are broken by name, by the share of a layer's weights that a rank has, and by rank, so that every rank
    computes the same answer.
    """
    ranks, owner = range(len(load)), {}
    for layer in sorted(costs, key=lambda name: (-costs[name], name)):
        held = (shares or {}).get(layer, [0] * len(load))
        *_, rank = min((load[rank], -held[rank], rank) for rank in ranks)
        owner[layer] = rank
        load[rank] += costs[layer]
    return owner


def owners_of(costs: Mapping[str, int], config: NGDConfig, world_size: int, local: Collection[str] = ()) -> Owners:
    """Returns the owners and the holders of a job. costs: the operations of refreshing each layer.

    local: the layers of which each rank has a cache of its own.
    """
    strategy = strategy_of(config, world_size)
    fraction, below = (strategy.fraction, strategy.replicate_below) if isinstance(strategy, OwnerSharded) else (0.0, 0)
    owner = least_loaded(costs, [0] * world_size)
    small = frozenset(layer for layer, cost in costs.items() if cost < below and layer not in local)
    everywhere = frozenset(costs) if isinstance(strategy, AllReduce) else small | frozenset(local)
    shared = max(1, ceil(fraction * world_size))
    holders = {layer: world_size if layer in everywhere else shared for layer in costs}
    return Owners(world_size, {layer: owner[layer] for layer in costs}, holders, everywhere, small)
