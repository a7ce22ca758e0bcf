"""The seconds of a step, by phase: arithmetic at a device's rates, and messages over links.

All ranks wait for each other, so that a phase takes as long as on the rank with most to do in that step.
"""

from math import log2

from ngd_dist.config import Empirical, MonteCarlo, NGDConfig
from ngd_dist.cost.cluster import Cluster, Device
from ngd_dist.cost.forms import BYTES
from ngd_dist.cost.methods import LayerCost
from ngd_dist.cost.relay import relays
from ngd_dist.cost.setup import Setup
from ngd_dist.cost.traffic import COLLECTIVE, Traffic, mean_traffic

__all__ = ["PHASES", "UPDATE_PASSES", "Network", "owners_work", "seconds", "statistic_flops"]

PHASES = ("forward_backward", "statistics", "refresh", "apply", "update", "communication")
BACKWARD = 2  # backward takes twice the operations of forward
UPDATE_PASSES = 6  # over all weights: gradients and directions joined and split, momentum and weights read and written
PASSES = 256  # operations that take as long as the passes over a number of a row; as `Preconditioner.work` counts
# Passes over the numbers of packed statistics: to gather, encode and copy them; to add up those of each other rank; and
# to unpack the sum. A gather takes as long as five passes to pack, and ten to unpack (512 rows, one CPU thread).
SENDING, RECEIVING, UNPACKING = 8, 3, 10
MOVING = 16  # passes over gradients and over directions: into a message, out of it, added up, joined and split
OVERLAPPING = ("statistics", "engine")  # kinds that travel while backward goes on


def seconds(setup: Setup, cluster: Cluster, *, hides: bool = True, traffic: Traffic | None = None) -> dict[str, float]:
    """Returns the seconds of a step by phase, a mean over all steps.

    hides: whether communication is that alone which backward does not hide. Of a processor's own time nothing hides.
    traffic: that of the setup, if the caller has counted it.
    """
    device = cluster.device
    phases = dict.fromkeys(PHASES, 0.0)
    phases["forward_backward"] = _forward_backward(setup, device)
    phases["update"] = UPDATE_PASSES * BYTES * setup.card.parameters / (device.memory_gb_s * 1e9)
    if setup.engine.shards_state and setup.world_size > 1:
        phases["update"] /= setup.world_size
    if setup.config is not None:
        phases["statistics"] = _statistics(setup, setup.config, device)
        refresh, apply = owners_work(setup, setup.config)
        phases["refresh"] = refresh / _rate(device, device.inverse_efficiency) + _in_turn(setup, setup.config, device)
        phases["apply"] = apply / _rate(device, device.apply_efficiency)
    if setup.world_size > 1:
        if setup.config is not None:
            phases["statistics"] += _packing(setup, device)
        hidden = phases["forward_backward"] * BACKWARD / (1 + BACKWARD) * hides
        phases["communication"] = _communication(setup, cluster, hidden, traffic or mean_traffic(setup))
    return phases


class Network:
    """The links of the ranks: those of one node are filled first."""

    def __init__(self, cluster: Cluster, world_size: int) -> None:
        self._cluster = cluster
        self.ranks = world_size
        self.per_node = min(cluster.devices_per_node, world_size)
        self.nodes = -(-world_size // self.per_node)

    def all_reduce(self, nbytes: float) -> float:
        """Returns the seconds of summing a buffer, of which each rank sends `nbytes`: a ring, or a tree if shorter."""
        link = self._cluster.inside if self.nodes == 1 else self._cluster.between
        steps = min(2.0 * (self.ranks - 1), 2 * log2(self.ranks) + 2)
        return link.seconds(nbytes, steps)

    def exchange(self, nbytes: float, messages: float) -> float:
        """Returns the seconds of sending `nbytes` from each rank to others, evenly; ranks of a node share its link."""
        if self.nodes == 1:
            return self._cluster.inside.seconds(nbytes, min(messages, self.ranks - 1))
        away = nbytes * (self.ranks - self.per_node) / (self.ranks - 1)
        over_link = self._cluster.between.seconds(away * self.per_node, log2(self.ranks))
        return max(over_link, self._cluster.inside.seconds(nbytes - away))

    def bytes_between(self, by_ring: float, by_exchange: float) -> float:
        """Returns the bytes that leave a node in a step, for those that a rank sends in either way."""
        if self.nodes == 1:
            return 0.0
        away = (self.ranks - self.per_node) / (self.ranks - 1)
        return by_ring + by_exchange * away * self.per_node


def _rate(device: Device, efficiency: float) -> float:
    return device.tflops * 1e12 * efficiency


def _forward_backward(setup: Setup, device: Device) -> float:
    flops = (1 + BACKWARD) * setup.card.forward_flops * setup.samples
    calls = setup.micro_batches * len(setup.card.layers) * device.layer_us / 1e6
    return device.step_us / 1e6 + calls + flops / _rate(device, device.efficiency)


def _statistics(setup: Setup, config: NGDConfig, device: Device) -> float:
    """Returns the seconds of estimating statistics, the passes of a Fisher of its own among them."""
    flops = setup.statistic_samples * statistic_flops(setup, config)
    calls = len(setup.layers) * device.refresh_us / 1e6
    extra = _fisher_passes(setup, config) * setup.card.forward_flops * setup.statistic_samples
    each = flops / _rate(device, device.statistics_efficiency) + calls + extra / _rate(device, device.efficiency)
    return setup.estimates * each


def _in_turn(setup: Setup, config: NGDConfig, device: Device) -> float:
    """Returns the seconds by which refreshes take longer for layers that are alike but are not due together."""
    if config.stagger == 0:
        return 0.0
    everywhere = len(setup.owners.everywhere)
    inverted = everywhere + (len(setup.layers) - everywhere) / setup.world_size
    return setup.refreshes * (1 - setup.refreshes) * inverted * device.in_turn_us / 1e6


def _packing(setup: Setup, device: Device) -> float:
    """Returns the seconds of packing new statistics, of adding up and unpacking those of the busiest rank, and of the
    same with gradients and directions in each step.
    """
    owners, others = setup.owners, setup.world_size - 1
    owned = owners.sums({name: layer.sent_numbers for name, layer in setup.layers.items()})
    packed = owned.total()
    received = packed if len(owners.everywhere) == len(setup.layers) else max(owned.values())
    added = packed if relays(owned.values(), setup.world_size) else others * received
    numbers = SENDING * packed + RECEIVING * added + UNPACKING * received
    moved = 0 if setup.engine.averages else MOVING * setup.card.parameters
    return (setup.estimates * numbers + moved) * BYTES / (device.memory_gb_s * 1e9)


def statistic_flops(setup: Setup, config: NGDConfig) -> int:
    """Returns the operations of estimating all statistics once, for each sample."""
    return sum(
        positions_of(layer, config) * max(statistic.form.row_flops, PASSES * statistic.form.row_numbers)
        for layer in setup.layers.values()
        for statistic in layer.statistics
    )


def positions_of(layer: LayerCost, config: NGDConfig) -> int:
    """Returns the rows of a sample from which the layer's statistics are made."""
    reduces = getattr(config.preconditioner, "sharing", "expand") == "reduce" and not layer.card.has_one_hot_inputs
    return 1 if reduces and layer.card.fisher == "kronecker" else layer.card.positions


def _fisher_passes(setup: Setup, config: NGDConfig) -> int:
    """Returns the passes, in units of forward, that labels of the model's own need for each sample of a statistic."""
    fisher = config.fisher
    if isinstance(fisher, Empirical):
        return 0
    forward = int(config.statistics_fraction < 1)
    outputs = setup.card.layers[-1].outputs if setup.card.layers else 1
    return forward + BACKWARD * (fisher.samples if isinstance(fisher, MonteCarlo) else outputs)


def owners_work(setup: Setup, config: NGDConfig) -> tuple[float, int]:
    """Returns the operations that refreshes and `apply` cost each step, on the rank with most to do in that step."""
    owners, ranks = setup.owners, setup.world_size
    refresh, apply, everywhere = [0] * ranks, [0] * ranks, [0, 0]
    for name, layer in setup.layers.items():
        if name in owners.everywhere:
            everywhere[0] += layer.refresh_flops
            everywhere[1] += layer.apply_flops
            continue
        refresh[owners.owner[name]] += layer.refresh_flops
        for rank in owners.holders(name):
            apply[rank] += layer.apply_flops
    share = setup.refreshes
    waited = _mean_of_longest(refresh, share) if config.stagger > 0 else share * max(refresh)
    return share * everywhere[0] + waited, everywhere[1] + max(apply)


def _mean_of_longest(work: list[int], share: float) -> float:
    """Returns the mean, over steps, of the largest work of any rank, if each is due in this share of them by chance.

    The longest counts whenever it is due, the next one if it is due and the longest is not, and so on.
    """
    mean, is_longest = 0.0, 1.0
    for each in sorted(work, reverse=True):
        mean += each * share * is_longest
        is_longest *= 1 - share
    return mean


def _communication(setup: Setup, cluster: Cluster, hidden: float, traffic: Traffic) -> float:
    """Returns the seconds of all messages of a step, less the seconds of backward behind which some of them hide."""
    network, beside, alone = Network(cluster, setup.world_size), 0.0, 0.0
    layers = max(1, len(setup.layers))
    for kind, nbytes in traffic.busiest.items():
        taken = network.all_reduce(nbytes) if kind in COLLECTIVE else network.exchange(nbytes, layers)
        if kind in OVERLAPPING and (kind == "engine" or _overlaps(setup)):
            beside += taken
        else:
            alone += taken
    return alone + max(0.0, beside - hidden)


def _overlaps(setup: Setup) -> bool:
    return setup.config is not None and setup.config.bucket_mb > 0
