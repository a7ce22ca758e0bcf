"""What refreshes cost, for schedules."""

from collections.abc import Mapping

from ngd_dist.statistics.staleness import Work


def together(costs: Mapping[str, int]) -> Work:
    """Returns the work of layers that are refreshed as a whole, whatever is due of them."""
    return lambda layer, _: costs[layer]


def apart(costs: Mapping[str, int]) -> Work:
    """Returns the work of statistics that are refreshed one by one, at the same cost in each layer."""
    return lambda layer, rows: costs[layer] * len(rows)
