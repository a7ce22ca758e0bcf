"""The ranks that reduce, invert and apply each layer: a pure function of costs and world size."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from ngd_dist.cost.placement import least_loaded

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
    local: Collection[str] = (),
) -> Placement:
    """Returns the roles, with the owners that `least_loaded` gives.

    A share of the ranks holds a layer, `fraction` of them and one at least. All ranks refresh and hold a layer that
    costs less than `replicate_below`, every layer if `everyone_inverts`, and the `local` ones, of which each rank has a
    cache of its own. Roles that are `fixed` stay.
    """
    load = [0] * world_size
    all_ranks = tuple(range(world_size))
    held_by = max(1, ceil(fraction * world_size))
    roles: dict[str, Roles] = {layer: role for layer, role in (fixed or {}).items() if layer in costs}
    for layer, role in roles.items():
        load[role.owner] += costs[layer]
    free = {layer: cost for layer, cost in costs.items() if layer not in roles}
    for layer, owner in least_loaded(free, load, shares).items():
        holders = tuple((owner + i) % world_size for i in range(held_by))
        is_small = costs[layer] < replicate_below and layer not in local
        if is_small or everyone_inverts or layer in local:
            roles[layer] = Roles(owner, all_ranks, (owner, *(r for r in all_ranks if r != owner)), is_small)
        else:
            roles[layer] = Roles(owner, (owner,), holders)
    return Placement(world_size, {layer: roles[layer] for layer in costs})
