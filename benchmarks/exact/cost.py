"""CPU seconds of a step of EnergyNGD: beside Adam's on the same problem, and by weights, rows and ranks."""

import itertools
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.exact.curves import seconds_of
from benchmarks.exact.equations import adam_step
from benchmarks.exact.problems import POISSON, Problem
from benchmarks.ranks import on_ranks
from ngd_dist.exact import EnergyNGD

__all__ = ["beside_adam", "growth", "over_ranks"]

BLOCKS = 7
ADAMS = 20  # steps of Adam in a block, for one of EnergyNGD takes longer than the clock's grain
WIDTHS, SIDES = (16, 32, 64, 128, 256, 512), (10, 20, 30, 60, 90)
FORMS = ("weights", "kernel")
MOST_ROWS_OF_KERNEL = 4000


def beside_adam(problem: Problem) -> list[dict[str, Any]]:
    """Returns the times of a step over Adam's, in turn: with the line search, and with a given length."""
    points, rival = problem.points(problem.size, None), problem.network(0)
    loss, adam = partial(problem.loss, rival, points), torch.optim.Adam(rival.parameters())
    searching, given = (
        EnergyNGD(problem.network(0), problem.parts, problem.config().model_copy(update=update))
        for update in ({}, {"line_search": None, "lr": 0.01})
    )
    works = {
        "Adam": (lambda: adam_step(adam, loss), ADAMS),
        "EnergyNGD": (lambda: searching.step(points), 2),
        "EnergyNGD, no line search": (lambda: given.step(points), 5),
    }
    for work, _ in works.values():
        work()
    blocks = [{name: seconds_of(*work) for name, work in works.items()} for _ in range(BLOCKS)]
    rows = []
    for name in works:
        ratios = sorted(block[name] / block["Adam"] for block in blocks)
        ms = 1e3 * median(block[name] for block in blocks)
        rows.append(
            {
                "problem": problem.name,
                "method": name,
                "ms": ms,
                "ratio": median(ratios),
                "spread": ratios[:: BLOCKS - 1],
            }
        )
    return rows  # fmt: skip


def growth() -> list[dict[str, Any]]:
    """Returns the time of a step by the width of the network at 900 points, and by points at 32 units, in turn."""
    cases = [("weights", width, 30) for width in WIDTHS] + [("rows", 32, side) for side in SIDES]
    rows = list[dict[str, Any]]()
    steps = []
    for (by, width, side), form in itertools.product(cases, FORMS):
        points = POISSON.points(side, None)
        count = sum(map(len, points.values()))
        if form == "weights" or count <= MOST_ROWS_OF_KERNEL:
            steps.append(partial(_poisson(width, form).step, points))
            rows.append({"by": by, "form": form, "weights": 4 * width + 1, "rows": count})
    # The first of the blocks warms up. The least time is that with the least noise of other processes.
    blocks = [[seconds_of(step, 1) for step in steps] for _ in range(BLOCKS)][1:]
    return [row | {"ms": 1e3 * min(times)} for row, times in zip(rows, zip(*blocks, strict=True), strict=True)]


def over_ranks(width: int = 64, side: int = 60) -> list[dict[str, Any]]:
    """Returns the time that each rank spends on a step of all points, by ranks and form."""
    return [
        {"ranks": ranks, "form": form, "weights": 4 * width + 1, "rows": 4 * side + (side - 2) ** 2, "ms": max(times)}
        for form in FORMS
        for ranks in (1, 2)
        for times in [on_ranks(ranks, _of_rank, width, side, form)]
    ]


def _of_rank(rank: int, world_size: int, width: int, side: int, form: str) -> float:
    points = {name: some[rank::world_size] for name, some in POISSON.points(side, None).items()}
    optimizer = _poisson(width, form)
    optimizer.step(points)
    return 1e3 * median(seconds_of(lambda: optimizer.step(points), 1) for _ in range(5))


def _poisson(width: int, form: str) -> EnergyNGD:
    config = POISSON.config().model_copy(update={"form": form})
    return EnergyNGD(POISSON.network(0, hidden=width), POISSON.parts, config)
