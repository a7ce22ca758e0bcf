"""Physics-informed networks under three optimizers. Poisson's equation is that of the tests; PROBLEMS may grow."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from benchmarks.exact.curves import curve, follow
from ngd_dist.config import EnergyNGDConfig
from ngd_dist.exact import EnergyNGD, Residual
from tests.ngd_dist.exact.pinns import POISSON, WEIGHTS, grid_points, network, relative_error

__all__ = ["PROBLEMS", "Pinn", "adam_step", "curves", "energy", "loss_of"]

ENERGY_STEPS, ADAM_STEPS, LBFGS_CALLS, LBFGS_STEPS = 300, 5000, 150, 20
ADAM_LR = 1e-2  # then cosine to 0 over all steps


@dataclass(frozen=True)
class Pinn:
    """A problem: its network of a seed, the residuals of its parts and their weights, points, and its error."""

    name: str
    network: Callable[[int], nn.Module]
    residuals: Mapping[str, Residual]
    weights: Mapping[str, float]
    points: Callable[[], dict[str, Tensor]]
    error: Callable[[Any], float]


PROBLEMS = [
    Pinn("Poisson 2-D", lambda seed: network(32, seed), POISSON, WEIGHTS, lambda: grid_points(30), relative_error)
]


def loss_of(problem: Pinn, model: nn.Module, points: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """Returns the loss that EnergyNGD minimises, for optimizers that differentiate it."""

    def u(x: Tensor) -> Tensor:
        return functional_call(model, dict(model.named_parameters()), (x,)).squeeze()

    def loss() -> Tensor:
        squares = {
            name: vmap(lambda x, r=residual: r(u, x))(points[name]).square().mean()
            for name, residual in problem.residuals.items()
        }
        return sum((problem.weights.get(name, 1.0) * square for name, square in squares.items()), torch.zeros(()))

    return loss


def energy(problem: Pinn, model: nn.Module, **settings: Any) -> EnergyNGD:
    config = EnergyNGDConfig(part_weights=dict(problem.weights), **settings)
    return EnergyNGD(model, problem.residuals, config)


def adam_step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


def curves(problem: Pinn, seed: int) -> list[dict[str, Any]]:
    """Returns the error of each optimizer, from the same first weights and on the same points."""
    points, models = problem.points(), [problem.network(seed) for _ in range(3)]
    exact = energy(problem, models[0])
    adam = torch.optim.Adam(models[1].parameters(), lr=ADAM_LR)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, ADAM_STEPS)
    losses = [loss_of(problem, model, points) for model in models]
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
        curve(problem.name, name, seed, follow(step, lambda m=model: problem.error(m), calls, stride=stride))
        for model, (name, (step, calls, stride)) in zip(models, taken.items(), strict=True)
    ]
