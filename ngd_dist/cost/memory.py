"""The bytes that each rank holds, by kind, at the fullest moment: between backward and the step."""

from collections.abc import Mapping
from math import ceil

from ngd_dist.config import AdamWFallback, NGDConfig, QuadraticModel
from ngd_dist.cost.forms import BYTES
from ngd_dist.cost.relay import relays
from ngd_dist.cost.setup import Setup

__all__ = ["bytes_held", "fullest_rank"]

ADAM_STATE = 2  # numbers for each weight


def bytes_held(setup: Setup, rank: int = 0) -> dict[str, int]:
    """Returns the bytes of a rank by kind.

    weights, gradients, momentum, statistics, inverses and buffers are exactly those of the tensors that stay, unless
    the engine shards them. Estimates: activations, those that autograd keeps of one micro-batch; new statistics, of
    this rank's samples, of all layers in a step in which all are due; rows, of the layer with most, while its
    statistics are made; messages, the larger of statistics and gradients on their way out and in.
    """
    engine, ranks, numbers = setup.engine, setup.world_size, setup.card.parameters

    def share(of_all: int, is_sharded: bool) -> int:
        return BYTES * (ceil(of_all / ranks) if is_sharded else of_all)

    held = {
        "weights": share(numbers, engine.shards_weights),
        "gradients": share(numbers, engine.shards_gradients),
        "momentum": share(_state(setup), engine.shards_state),
        "statistics": 0,
        "inverses": 0,
        "buffers": setup.card.buffer_bytes,
        "new statistics": 0,
        "activations": setup.card.activation_bytes * ceil(setup.samples / setup.micro_batches),
        "rows": 0,
        "messages": 0,
    }
    if setup.config is not None:
        held |= _of_ngd(setup, setup.config, rank)
    if ranks > 1:
        held["messages"] = _messages(setup, rank)
    return held


def fullest_rank(setup: Setup) -> int:
    """Returns the rank that holds most."""
    if setup.config is None or setup.world_size == 1:
        return 0
    totals = [0] * setup.world_size
    for name, layer in setup.layers.items():
        totals[setup.owners.owner[name]] += layer.sent_numbers * setup.world_size
        if name not in setup.owners.everywhere:
            totals[setup.owners.owner[name]] += layer.statistic_numbers
            for rank in setup.owners.holders(name):
                totals[rank] += layer.cached_bytes(setup.config.inverse_dtype) // BYTES
    return max(range(setup.world_size), key=lambda rank: totals[rank])


def _state(setup: Setup) -> int:
    """Returns the numbers that the optimizer keeps beside the weights."""
    if not isinstance(setup.optimizer, NGDConfig):
        return setup.optimizer.state * setup.card.parameters
    config, plain = setup.optimizer, setup.card.other_parameters
    has_momentum = config.momentum > 0 or isinstance(config.length, QuadraticModel)
    covered = (setup.card.parameters - plain) * has_momentum
    return covered + plain * (ADAM_STATE if isinstance(config.uncovered, AdamWFallback) else int(has_momentum))


def _of_ngd(setup: Setup, config: NGDConfig, rank: int) -> dict[str, int]:
    owners, adapts = setup.owners, config.staleness.kind == "adaptive"
    statistics = inverses = rows = 0
    for name, layer in setup.layers.items():
        if owners.inverts(name, rank):
            statistics += BYTES * layer.statistic_numbers
            statistics += BYTES * layer.remembered_numbers * (adapts and (layer.is_local or owners.owner[name] == rank))
        if owners.holds(name, rank):
            inverses += layer.cached_bytes(config.inverse_dtype)
        elif layer.shared:
            inverses += sum(BYTES * layer.cache[entry].held for entry in layer.shared)
        card = layer.card
        row = card.blocks * (card.outputs + (0 if card.has_one_hot_inputs else card.inputs))
        rows = max(rows, BYTES * setup.statistic_samples // setup.micro_batches * card.positions * row)
    new = BYTES * sum(layer.statistic_numbers for layer in setup.layers.values())
    halves = setup.world_size == 1 and setup.micro_batches == 1 and config.measures_noise
    return {
        "statistics": statistics,
        "inverses": inverses,
        "new statistics": new * (2 if halves else 1),  # noise is measured between two halves of the only micro-batch
        "rows": rows,
    }


def _messages(setup: Setup, rank: int) -> int:
    """Returns the bytes of the buffers of messages, of statistics or of gradients: those out, and those in.

    An owner receives its layers' from each other rank, or each rank its part in two hops; all of them are there before
    they are added up.
    """
    engine, ranks, numbers = setup.engine, setup.world_size, setup.card.parameters
    out = ceil(numbers / ranks) if engine.is_sharded else numbers
    if setup.config is None:
        return BYTES * (2 - engine.averages) * out
    owners = setup.owners
    is_sent = not engine.averages or engine.is_sharded
    gradients = {n: layer.card.parameters * is_sent for n, layer in setup.layers.items()}
    statistics = {n: layer.sent_numbers for n, layer in setup.layers.items()}

    def arriving(sizes: Mapping[str, int]) -> int:
        owned = owners.sums(sizes)
        return owned.total() if relays(owned.values(), ranks) else (ranks - 1) * owned[rank]

    of_gradients = owners.sums(gradients)[rank] if engine.is_sharded else arriving(gradients)  # pieces make a whole
    return BYTES * max(out + of_gradients, sum(statistics.values()) + arriving(statistics))
