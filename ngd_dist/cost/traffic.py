"""The bytes that each rank sends in a step, by kind, as `StepStats.bytes_sent` counts them.

They follow `ngd_dist.distributed.sync`: statistics to owners, gradients to owners or to all, inverses to holders,
directions to the others, reports. Unless the engine shards, they are those bytes exactly, if no layer is left out of a
step and no setting evaluates the loss again. The bytes of an engine's own collectives are under "engine".
"""

from collections.abc import Iterable, Mapping, Sequence

from ngd_dist.config import AllReduce, KLClip, LayerWise, NGDConfig
from ngd_dist.cost.engines import pieces
from ngd_dist.cost.methods import BYTES, aligned
from ngd_dist.cost.placement import strategy_of
from ngd_dist.cost.setup import Occasion, Setup

__all__ = ["busiest_bytes", "bytes_sent", "mean_bytes_sent"]

FLAGS = 2  # numbers: whether a gradient is not finite, and how many are missing
COUNTS = 5  # numbers on each due layer, beside a mean square of each statistic if noise is measured
CURVATURES = 3  # numbers on each layer that a length by layer sums over the ranks
REPORT = 10  # numbers on each due statistic

COLLECTIVE = ("engine", "step length")  # kinds that all ranks sum or gather in equal parts

ByRank = dict[str, list[int]]
Due = Mapping[str, Sequence[str]]


def mean_bytes_sent(setup: Setup) -> dict[str, list[float]]:
    """Returns the bytes that each rank sends in a step by kind, the mean over all kinds of steps."""
    total: dict[str, list[float]] = {}
    for occasion in setup.occasions:
        for kind, by_rank in bytes_sent(setup, _due(setup, occasion), is_averaged=occasion.is_averaged).items():
            sums = total.setdefault(kind, [0.0] * setup.world_size)
            total[kind] = [mean + occasion.share * sent for mean, sent in zip(sums, by_rank, strict=True)]
    return total


def busiest_bytes(setup: Setup) -> dict[str, float]:
    """Returns the bytes by kind that the busiest rank sends or receives in a step, the mean over all kinds of steps.

    A rank sends directly to the owner, so that the owner of a large layer receives its gradient from all others, and
    sends them its direction. If `sums_on_the_way`, each rank sends and receives the mean of all ranks.
    """
    ranks, sent = setup.world_size, mean_bytes_sent(setup)
    if setup.sums_on_the_way:
        return {kind: sum(by_rank) / ranks for kind, by_rank in sent.items()}
    busiest = {kind: max(by_rank) for kind, by_rank in sent.items()}
    if setup.config is None or isinstance(strategy_of(setup.config, ranks), AllReduce):
        return busiest
    by_owners = {"statistics", "gradients"}
    if setup.engine.is_sharded:  # an owner receives the pieces of a gradient, as many bytes as it sends back
        busiest["gradients"] = max(busiest.get("gradients", 0.0), busiest.get("directions", 0.0))
        by_owners = {"statistics"}
    for kind in by_owners & sent.keys():  # a part that an owner does not send, all others send to it
        busiest[kind] = max(busiest[kind], (ranks - 1) * (busiest[kind] - min(sent[kind])))
    return busiest


def bytes_sent(setup: Setup, due: Due, *, is_averaged: bool = False) -> ByRank:
    """Returns the bytes that each rank sends by kind in a step in which these statistics are due, by layer.

    is_averaged: whether they enter the average, and no inverse is made of them yet.
    """
    if setup.world_size == 1:
        return {}
    own = {} if setup.config is None else _of_ngd(setup, due, setup.config, is_averaged=is_averaged)
    engine = _of_engine(setup)
    if engine:
        own["engine"] = [engine] * setup.world_size
    return {kind: by_rank for kind, by_rank in own.items() if any(by_rank)}


def _of_engine(setup: Setup) -> int:
    """Returns the bytes of averaging gradients and gathering weights, outside of NGD."""
    engine = setup.engine
    times = engine.sums + engine.gathers + engine.gathers_each * setup.micro_batches
    return times * BYTES * setup.card.parameters * (setup.world_size - 1) // setup.world_size


def _of_ngd(setup: Setup, due: Due, config: NGDConfig, *, is_averaged: bool) -> ByRank:
    sent: ByRank = {}
    _add(sent, "statistics", _statistics(setup, config, due))
    for kind, numbers in _summed(setup, config, due).items():
        _add(sent, kind, _by_ring(setup, numbers))
    _add(sent, "gradients", _gradients(setup))
    if due and not is_averaged:
        _add(sent, "inverses", _inverses(setup, config, due))
    is_sharded = any(holders < setup.world_size for holders in setup.owners.num_holders.values())
    if is_sharded or due:
        _add(sent, "directions" if is_sharded else "reports", _directions(setup, config, due))
    if isinstance(config.length, LayerWise):
        _add(sent, "step length", _by_ring(setup, CURVATURES * len(setup.layers)))
    return sent


def _by_ring(setup: Setup, numbers: int) -> list[int]:
    """Returns the bytes of summing these numbers on all ranks."""
    return [2 * numbers * BYTES * (setup.world_size - 1) // setup.world_size] * setup.world_size


def _due(setup: Setup, occasion: Occasion) -> Due:
    """Returns the statistics that are due in a step of this kind, by layer."""
    in_standard, in_basis = occasion.due
    due = {
        name: [s.name for s in layer.statistics if (in_basis if s.in_basis else in_standard)]
        for name, layer in setup.layers.items()
    }
    return {name: statistics for name, statistics in due.items() if statistics}


def _statistics(setup: Setup, config: NGDConfig, due: Due) -> list[int]:
    """Returns the bytes of sending statistics to their owners, and the sums of those that all ranks need to all."""
    owners, ranks = setup.owners, setup.world_size
    owned, total, spread = [0] * ranks, 0, [0] * ranks
    for name in due:
        if name in owners.small:
            continue
        nbytes = sum(
            s.form.on_wire(config.statistics_wire) for s in setup.layers[name].statistics if s.name in due[name]
        )
        total += nbytes
        owned[owners.owner[name]] += nbytes
        if name in owners.everywhere:
            spread[owners.owner[name]] += nbytes * (ranks - 1)
    return [total - own + to_all for own, to_all in zip(owned, spread, strict=True)]


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


def _gradients(setup: Setup) -> list[int]:
    """Returns the bytes of sending gradients, or an engine's pieces of them, to the ranks that hold the layers."""
    owners, ranks, engine = setup.owners, setup.world_size, setup.engine
    if engine.averages and not engine.is_sharded:
        return [0] * ranks
    sent = [0] * ranks
    if not engine.is_sharded:
        single = [name for name in setup.layers if owners.num_holders[name] == 1]
        sizes = {name: aligned(BYTES * setup.layers[name].card.parameters) for name in single}
        sent = [sum(sizes.values())] * ranks
        for name, size in sizes.items():
            sent[owners.owner[name]] -= size
        return sent
    for name, held in _pieces(setup):
        others = owners.num_holders[name]
        for rank, numbers in held:
            sent[rank] += BYTES * numbers * (others - owners.holds(name, rank))
    return sent


def _pieces(setup: Setup) -> Iterable[tuple[str, list[tuple[int, int]]]]:
    """Returns the pieces of each layer's gradient by rank."""
    sizes = {name: layer.card.parameters for name, layer in setup.layers.items()}
    joined = pieces(setup.engine, list(sizes.values()), setup.world_size)
    if joined is not None:
        return zip(sizes, joined, strict=True)
    everyone = range(setup.world_size)
    return ((name, [(rank, size // setup.world_size) for rank in everyone]) for name, size in sizes.items())


def _inverses(setup: Setup, config: NGDConfig, due: Due) -> list[int]:
    """Returns the bytes of giving new inverses to the other ranks that hold a layer, and bases to all."""
    owners, ranks = setup.owners, setup.world_size
    sent, owned, is_any = [0] * ranks, [0] * ranks, False
    for name in due:
        layer = setup.layers[name]
        is_new_basis = any(s.name in due[name] and not s.in_basis for s in layer.statistics)
        changed = [entry for entry in layer.cache if is_new_basis or entry not in layer.shared]
        shared = [entry for entry in changed if entry in layer.shared]
        if name in owners.everywhere or not (owners.num_holders[name] > 1 or shared):
            continue
        is_any, owner, holders = True, owners.owner[name], owners.num_holders[name]
        owned[owner] += 1
        whole, part = (sum(layer.cache[e].in_cache(config.inverse_dtype) for e in es) for es in (changed, shared))
        sent[owner] += whole * (holders - 1) + part * (ranks - holders)
    if not is_any:
        return sent
    return [nbytes + (ranks - 1) * aligned(BYTES * layers) for nbytes, layers in zip(sent, owned, strict=True)]


def _directions(setup: Setup, config: NGDConfig, due: Due) -> list[int]:
    """Returns the bytes of giving directions to the ranks that don't hold a layer, with the owners' reports."""
    owners, ranks = setup.owners, setup.world_size
    sent, reported = [0] * ranks, [0] * ranks
    has_inner = isinstance(config.length, LayerWise) or isinstance(config.clip, KLClip)
    for name, names in due.items():
        reported[owners.owner[name]] += len(names)
    pieces_of = dict(_pieces(setup)) if setup.engine.is_sharded else {}
    for name, layer in setup.layers.items():
        holders = owners.num_holders[name]
        if holders == ranks:
            continue
        if setup.engine.is_sharded:
            away = sum(numbers for rank, numbers in pieces_of[name] if not owners.holds(name, rank))
            sent[owners.owner[name]] += BYTES * away
            continue
        nbytes = aligned(BYTES * layer.card.parameters)
        if holders == 1:
            sent[owners.owner[name]] += nbytes * (ranks - 1)
            continue
        holding = owners.holders(name)
        for rank in set(range(ranks)) - set(holding):
            sent[holding[rank % holders]] += nbytes
    inner = aligned(BYTES * len(setup.layers)) if has_inner else 0
    return [
        nbytes + (ranks - 1) * (aligned(BYTES * REPORT * reports) + inner)
        for nbytes, reports in zip(sent, reported, strict=True)
    ]


def _add(sent: ByRank, kind: str, by_rank: list[int]) -> None:
    known = sent.get(kind)
    sent[kind] = by_rank if known is None else [a + b for a, b in zip(known, by_rank, strict=True)]
