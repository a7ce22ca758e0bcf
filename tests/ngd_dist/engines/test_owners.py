"""A layer's owner is the rank that has its weights, among ranks with equal work."""

from ngd_dist.distributed.placement import place


def owners(costs: dict[str, int], shares: dict[str, list[int]] | None = None) -> dict[str, int]:
    return {name: roles.owner for name, roles in place(costs, 2, shares=shares).roles.items()}


def test_ties_go_to_the_rank_that_has_most_of_the_weights() -> None:
    costs = {"first": 10, "second": 10}

    assert owners(costs) == {"first": 0, "second": 1}
    assert owners(costs, {"first": [3, 5], "second": [5, 3]}) == {"first": 1, "second": 0}


def test_equal_work_comes_before_weights_at_hand() -> None:
    assert owners({"large": 10, "small": 4}, {"large": [9, 1], "small": [9, 1]}) == {"large": 0, "small": 1}
