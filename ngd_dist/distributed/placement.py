"""The ranks that reduce, invert and apply each layer: a pure function of costs and world size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

__all__ = ["Placement", "Roles", "place"]


@dataclass(frozen=True, slots=True)
class Roles:
    """The ranks' roles for one layer.

    owner: the rank to which its statistics are reduced, and the one that reports on it.
    inverters: the ranks that refresh its cache. Other holders get it from the owner.
    holders: the ranks that have its cache and turn its gradient into a direction; the owner is the first.
    is_small: its statistics are summed on all ranks with the gradients, and are not reduced to the owner before.
    """

    owner: int
    inverters: tuple[int, ...]
    holders: tuple[int, ...]
    is_small: bool = False


@dataclass(frozen=True, slots=True)
class Placement:
    """The roles in each layer, in registration order."""

    world_size: int
    roles: Mapping[str, Roles]

    def is_everywhere(self, layer: str) -> bool:
        """Returns whether every rank holds the layer: its gradient goes to all ranks, its direction to none."""
        return len(self.roles[layer].holders) == self.world_size

    def supplier(self, layer: str, rank: int) -> int:
        """Returns the holder that sends the layer's direction to a rank that does not hold it."""
        holders = self.roles[layer].holders
        return holders[rank % len(holders)]


def place(
    costs: Mapping[str, int],
    world_size: int,
    *,
    fraction: float = 0.0,
    replicate_below: int = 0,
    everyone_inverts: bool = False,
    fixed: Mapping[str, Roles] | None = None,
    shares: Mapping[str, Sequence[int]] | None = None,
) -> Placement:
    """Returns the roles: the most expensive layer goes first, to the rank that has least to do.

    A share of the ranks holds a layer, `fraction` of them and one at least. All ranks refresh and hold a layer that
    costs less than `replicate_below`, and every layer if `everyone_inverts`. Roles that are `fixed` stay.
    Ties are broken by name, by the share of a layer's weights that a rank has, and by rank, so that every rank computes
    the same answer. Source: [G69].
    """
    load = [0] * world_size
    all_ranks = tuple(range(world_size))
    held_by = max(1, ceil(fraction * world_size))
    roles: dict[str, Roles] = {layer: role for layer, role in (fixed or {}).items() if layer in costs}
    for layer, role in roles.items():
        load[role.owner] += costs[layer]
    for layer in sorted(costs.keys() - roles.keys(), key=lambda name: (-costs[name], name)):
        held = (shares or {}).get(layer, load)
        owner = min(all_ranks, key=lambda r: (load[r], -held[r], r))
        load[owner] += costs[layer]
        holders = tuple((owner + i) % world_size for i in range(held_by))
        is_small = costs[layer] < replicate_below
        if is_small or everyone_inverts:
            roles[layer] = Roles(owner, all_ranks, (owner, *(r for r in all_ranks if r != owner)), is_small)
        else:
            roles[layer] = Roles(owner, (owner,), holders)
    return Placement(world_size, {layer: roles[layer] for layer in costs})
