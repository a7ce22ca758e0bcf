"""The bytes that each rank sends and receives in a step, by kind, as `StepStats.bytes_sent` counts those sent.

They follow `ngd_dist.distributed.sync`: statistics to owners, gradients to owners or to all, inverses to holders,
directions to the others, reports; in two hops where `relays` says so. Unless the engine shards, they are those bytes
exactly, if no layer is left out of a step and no setting evaluates the loss again. The bytes of an engine's own
collectives are under "engine".
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ngd_dist.config import KLClip, LayerWise, NGDConfig
from ngd_dist.cost.engines import pieces
from ngd_dist.cost.forms import BYTES, HALF, aligned
from ngd_dist.cost.relay import cut, filled, relays
from ngd_dist.cost.setup import Occasion, Setup

__all__ = ["COLLECTIVE", "Traffic", "mean_traffic", "traffic"]

FLAGS = 2  # numbers: whether a gradient is not finite, and how many are missing
COUNTS = 5  # numbers on each due layer, beside a mean square of each statistic if noise is measured
CURVATURES = 3  # numbers on each layer that a length by layer sums over the ranks
REPORT = 12  # numbers on each due statistic
MIB = 2**20

COLLECTIVE = ("engine", "step length")  # kinds that all ranks sum or gather in equal parts

Bytes = list[float]  # by rank
ByRank = dict[str, Bytes]
Due = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Traffic:
    """Bytes by kind and rank: those that a rank sends, and those that it receives."""

    sent: ByRank = field(default_factory=dict)
    received: ByRank = field(default_factory=dict)

    @property
    def busiest(self) -> dict[str, float]:
        """The bytes by kind that one rank sends or receives at most."""
        return {kind: max(*sent, *self.received[kind]) for kind, sent in self.sent.items()}

    @property
    def mean_sent(self) -> dict[str, float]:
        """The bytes by kind that a rank sends, the mean over ranks."""
        return {kind: sum(sent) / len(sent) for kind, sent in self.sent.items()}

    def add(self, kind: str, way: tuple[Sequence[float], Sequence[float]], share: float = 1.0) -> None:
        """Adds what each rank sends and receives on a way that a share of the steps takes."""
        for by_rank, more in zip((self.sent, self.received), way, strict=True):
            known = by_rank.get(kind) or [0.0] * len(more)
            by_rank[kind] = [nbytes + share * new for nbytes, new in zip(known, more, strict=True)]


def mean_traffic(setup: Setup) -> Traffic:
    """Returns the traffic of a step, the mean over all kinds of steps."""
    total = Traffic()
    for occasion in setup.occasions:
        of_one = traffic(setup, _due(setup, occasion), is_averaged=occasion.is_averaged)
        for kind, sent in of_one.sent.items():
            total.add(kind, (sent, of_one.received[kind]), occasion.share)
    return total


def traffic(setup: Setup, due: Due, *, is_averaged: bool = False) -> Traffic:
    """Returns the traffic of a step in which these statistics are due, by layer, in the order of the model.

    is_averaged: whether they enter the average, and no inverse is made of them yet.
    """
    total = Traffic()
    if setup.world_size == 1:
        return total
    if setup.config is not None:
        _add_ngd(total, setup, due, setup.config, is_averaged=is_averaged)
    if engine := _of_engine(setup):
        total.add("engine", _equal(setup, engine))
    for kind in [kind for kind, sent in total.sent.items() if not any(sent)]:
        del total.sent[kind], total.received[kind]
    return total


def _of_engine(setup: Setup) -> int:
    """Returns the bytes of averaging gradients and gathering weights, outside of NGD."""
    engine = setup.engine
    times = engine.sums + engine.gathers + engine.gathers_each * setup.micro_batches
    return times * BYTES * setup.card.parameters * (setup.world_size - 1) // setup.world_size


def _add_ngd(total: Traffic, setup: Setup, due: Due, config: NGDConfig, *, is_averaged: bool) -> None:
    for way in _statistics(setup, config, due):
        total.add("statistics", way)
    for kind, numbers in _summed(setup, config, due).items():
        total.add(kind, _by_ring(setup, numbers))
    total.add("gradients", _gradients(setup))
    if local := [layer.card.parameters for layer in setup.layers.values() if layer.is_local]:
        total.add("directions", _by_ring(setup, sum(local) + len(local)))  # and whether this rank has a cache of each
    if due and not is_averaged:
        total.add("inverses", _inverses(setup, config, due))
    is_sharded = any(holders < setup.world_size for holders in setup.owners.num_holders.values())
    if is_sharded or due:
        total.add("directions" if is_sharded else "reports", _directions(setup, config, due))
    if isinstance(config.length, LayerWise):
        total.add("step length", _by_ring(setup, CURVATURES * len(setup.layers)))


# --- ways: what each rank sends, and receives -------------------------------------------------------------------------

Way = tuple[Bytes, Bytes]


def _equal(setup: Setup, nbytes: float) -> Way:
    return [nbytes] * setup.world_size, [nbytes] * setup.world_size


def _by_ring(setup: Setup, numbers: int) -> Way:
    """Of summing these numbers on all ranks."""
    return _equal(setup, 2 * numbers * BYTES * (setup.world_size - 1) // setup.world_size)


def _to_owners(owned: Sequence[float]) -> Way:
    """Of bytes that each other rank sends to an owner."""
    total, others = sum(owned), len(owned) - 1
    return [total - own for own in owned], [others * own for own in owned]


def _to_all(messages: Sequence[float]) -> Way:
    """Of a message of each rank that it sends to every other."""
    received, sent = _to_owners(messages)
    return sent, received


def _spread(messages: Sequence[int]) -> Way:
    """As `begin_spread` sends the message of each rank to all others."""
    ranks = len(messages)
    if not relays(messages, ranks):
        return _to_all(messages)
    first_sent, first_received, parts = [0.0] * ranks, [0.0] * ranks, [0.0] * ranks
    for source, rank, begin, end in cut(dict(enumerate(messages)), ranks):
        parts[rank] += end - begin
        if source != rank:
            first_sent[source] += end - begin
            first_received[rank] += end - begin
    return _together((first_sent, first_received), _to_all(parts))


def _in_two_hops(
    sizes: Mapping[Any, int],
    needed_by: Callable[[Any], Sequence[int]],
    ranks: int,
    *,
    is_rounded: Callable[[Any], bool] = lambda name: False,
) -> Way:
    """Of sums of tensors of these numbers, as `distributed.relay` makes them."""
    sent, received, there, to_all = ([0.0] * ranks for _ in range(4))
    for name, rank, begin, end in cut(sizes, ranks):
        numbers = end - begin
        there[rank] += aligned(BYTES) + aligned(HALF * numbers) if is_rounded(name) else aligned(BYTES * numbers)
        needed, nbytes = needed_by(name), aligned(BYTES * numbers)
        if len(needed) == ranks:
            to_all[rank] += nbytes
            continue
        for target in needed:
            if target != rank:
                sent[rank] += nbytes
                received[target] += nbytes
    return _together(_to_owners(there), _to_all(to_all), (sent, received))


def _together(*ways: Way) -> Way:
    sent, received = ([sum(of_rank) for of_rank in zip(*of_ways, strict=True)] for of_ways in zip(*ways, strict=True))
    return sent, received


# --- what goes which way ----------------------------------------------------------------------------------------------


def _due(setup: Setup, occasion: Occasion) -> Due:
    """Returns the statistics that are due in a step of this kind, by layer."""
    in_standard, in_basis = occasion.due
    due = {
        name: [s.name for s in layer.statistics if (in_basis if s.in_basis else in_standard)]
        for name, layer in setup.layers.items()
    }
    return {name: statistics for name, statistics in due.items() if statistics}


def _statistics(setup: Setup, config: NGDConfig, due: Due) -> Iterable[Way]:
    """Yields the ways of buckets to the owners, and of the sums of those that all ranks need to all."""
    owners, ranks, wire = setup.owners, setup.world_size, config.statistics_wire
    forms = {
        (name, s.name): s.form
        for name in due
        if name not in owners.small
        for s in setup.layers[name].statistics
        if s.name in due[name] and not s.is_local
    }
    sizes = {key: forms[key].on_wire(wire) for key in reversed(forms)}
    for bucket in filled(sizes, config.bucket_mb * MIB):
        owned, to_all = [0] * ranks, [0] * ranks
        for layer, name in bucket:
            owned[owners.owner[layer]] += sizes[layer, name]
            to_all[owners.owner[layer]] += sizes[layer, name] * (layer in owners.everywhere)
        if relays(owned, ranks):
            numbers = {key: forms[key].packed for key in bucket}
            yield _in_two_hops(
                numbers,
                lambda key: owners.inverters(key[0]),
                ranks,
                is_rounded=lambda key: wire != "float32" and forms[key].is_rounded,
            )
        else:
            yield _to_owners(owned)
            yield _to_all(to_all)


def _summed(setup: Setup, config: NGDConfig, due: Due) -> dict[str, int]:
    """Returns the numbers that are summed on all ranks at once, by kind."""
    owners = setup.owners
    statistics = sum(
        s.form.packed
        for name in due
        if name in owners.small
        for s in setup.layers[name].statistics
        if s.name in due[name]
    )
    others = sum(COUNTS + len(names) * config.measures_noise for names in due.values())
    if not setup.engine.averages:
        others += FLAGS + setup.card.other_parameters
        others += sum(layer.card.parameters for name, layer in setup.layers.items() if owners.num_holders[name] > 1)
    elif setup.engine.is_sharded:
        others += FLAGS  # a piece that is not finite lies on one rank alone
    return {"statistics": statistics, "gradients": others}


def _gradients(setup: Setup) -> Way:
    """Of gradients, or an engine's pieces of them, to the ranks that hold the layers."""
    owners, ranks, engine = setup.owners, setup.world_size, setup.engine
    if engine.averages and not engine.is_sharded:
        return _equal(setup, 0)
    if not engine.is_sharded:
        sizes = {name: c.card.parameters for name, c in setup.layers.items() if owners.num_holders[name] == 1}
        if relays(_owned(setup, sizes), ranks):
            return _in_two_hops(sizes, owners.holders, ranks)
        return _to_owners(_owned(setup, {name: aligned(BYTES * size) for name, size in sizes.items()}))
    sent, received = [0.0] * ranks, [0.0] * ranks
    for name, held in _pieces(setup):
        others = owners.num_holders[name]
        for rank, numbers in held:
            sent[rank] += BYTES * numbers * (others - owners.holds(name, rank))
        of_all, own = sum(numbers for _, numbers in held), dict(held)
        for holder in owners.holders(name):
            received[holder] += BYTES * (of_all - own.get(holder, 0))
    return sent, received


def _owned(setup: Setup, sizes: Mapping[str, int]) -> list[int]:
    """Returns the sum of sizes by owner."""
    sums = setup.owners.sums(sizes)
    return [sums[rank] for rank in range(setup.world_size)]


def _pieces(setup: Setup) -> Iterable[tuple[str, list[tuple[int, int]]]]:
    """Returns the pieces of each layer's gradient by rank."""
    sizes = {name: layer.card.parameters for name, layer in setup.layers.items()}
    joined = pieces(setup.engine, list(sizes.values()), setup.world_size)
    if joined is not None:
        return zip(sizes, joined, strict=True)
    everyone = range(setup.world_size)
    return ((name, [(rank, size // setup.world_size) for rank in everyone]) for name, size in sizes.items())


def _is_for_all(setup: Setup) -> bool:
    """Returns whether a rank sends all others the same: none holds a layer beside its owner, or all do."""
    return not setup.engine.is_sharded and set(setup.owners.num_holders.values()) <= {1, setup.world_size}


def _inverses(setup: Setup, config: NGDConfig, due: Due) -> Way:
    """Of new inverses to the other ranks that hold a layer, and of bases to all."""
    owners, ranks = setup.owners, setup.world_size
    owned, to_all, sent, received = [0] * ranks, [0] * ranks, [0.0] * ranks, [0.0] * ranks
    for name in due:
        layer, owner, holders = setup.layers[name], owners.owner[name], owners.num_holders[name]
        is_new_basis = any(s.name in due[name] and not s.in_basis for s in layer.statistics)
        changed = [entry for entry in layer.cache if is_new_basis or entry not in layer.shared]
        shared = [entry for entry in changed if entry in layer.shared]
        if name in owners.everywhere or not (holders > 1 or shared):
            continue
        owned[owner] += 1
        whole, part = (sum(layer.cache[e].in_cache(config.inverse_dtype) for e in es) for es in (changed, shared))
        to_all[owner] += part if holders == 1 else whole
        sent[owner] += whole * (holders - 1) + part * (ranks - holders)
        for rank in range(ranks):
            received[rank] += 0 if rank == owner else whole if owners.holds(name, rank) else part
    if not any(owned):
        return _equal(setup, 0)
    told = [aligned(BYTES * layers) for layers in owned]
    if _is_for_all(setup):
        return _spread([a + b for a, b in zip(told, to_all, strict=True)])
    return _together((sent, received), _to_all(told))


def _directions(setup: Setup, config: NGDConfig, due: Due) -> Way:
    """Of directions to the ranks that don't hold a layer, with the owners' reports."""
    owners, ranks = setup.owners, setup.world_size
    by_all = sum(s.is_local and s.name in names for name, names in due.items() for s in setup.layers[name].statistics)
    by_owner = {
        name: sum(not s.is_local and s.name in names for s in setup.layers[name].statistics)
        for name, names in due.items()
    }
    reported = [by_all + of_rank for of_rank in _owned(setup, by_owner)]
    has_inner = isinstance(config.length, LayerWise) or isinstance(config.clip, KLClip)
    inner = aligned(BYTES * len(setup.layers)) if has_inner else 0
    told = [aligned(BYTES * REPORT * reports) + inner for reports in reported]
    sizes = {n: aligned(BYTES * c.card.parameters) for n, c in setup.layers.items() if owners.num_holders[n] < ranks}
    if _is_for_all(setup):
        return _spread([a + b for a, b in zip(told, _owned(setup, sizes), strict=True)])
    sent, received = _to_all(told)
    pieces_of = dict(_pieces(setup)) if setup.engine.is_sharded else {}
    for name, nbytes in sizes.items():
        holding = owners.holders(name)
        taken = pieces_of.get(name) or [(rank, nbytes // BYTES) for rank in range(ranks)]
        for rank, numbers in taken:
            if not owners.holds(name, rank):
                sent[holding[rank % len(holding)]] += BYTES * numbers
                received[rank] += BYTES * numbers
    return sent, received
