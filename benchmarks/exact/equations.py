"""Physics-informed networks under three optimizers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.exact.curves import curve, follow
from benchmarks.exact.problems import POISSON, Problem
from ngd_dist.exact import EnergyNGD

__all__ = ["PROBLEMS", "adam_step", "curves"]

PROBLEMS = [POISSON]
ENERGY_STEPS, ADAM_STEPS, LBFGS_CALLS, LBFGS_STEPS = 300, 5000, 150, 20
ADAM_LR = 1e-2  # then cosine to 0 over all steps


def adam_step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


def curves(problem: Problem, seed: int) -> list[dict[str, Any]]:
    """Returns the error of each optimizer, from the same first weights and on the same points."""
    points, models = problem.points(problem.size, None), [problem.network(seed) for _ in range(3)]
    exact = EnergyNGD(models[0], problem.parts, problem.config())
    adam = torch.optim.Adam(models[1].parameters(), lr=ADAM_LR)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, ADAM_STEPS)
    losses = [partial(problem.loss, model, points) for model in models]
    # Without tolerances it goes on to the end.
    lbfgs = torch.optim.LBFGS(
        models[2].parameters(), max_iter=LBFGS_STEPS, max_eval=10 * LBFGS_STEPS, tolerance_grad=0.0,
        tolerance_change=0.0, history_size=100, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def quasi_newton() -> Tensor:
        lbfgs.zero_grad()
        loss = losses[2]()
        loss.backward()
        return loss

    taken = {
        "EnergyNGD": (lambda: exact.step(points), ENERGY_STEPS, 1),
        "Adam": (lambda: (adam_step(adam, losses[1]), decay.step()), ADAM_STEPS, 1),
        "L-BFGS": (lambda: lbfgs.step(quasi_newton), LBFGS_CALLS, LBFGS_STEPS),
    }
    return [
        curve(problem.name, name, seed, follow(step, lambda m=model: problem.relative_error(m), calls, stride=stride))
        for model, (name, (step, calls, stride)) in zip(models, taken.items(), strict=True)
    ]
