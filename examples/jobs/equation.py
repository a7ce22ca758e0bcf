"""A physics-informed network as a job: `train: {function: equation:train}`, on any number of workers."""

import math

import torch
from torch import Tensor, nn
from torch.func import grad, jacrev

from ngd_dist.config import EnergyNGDConfig
from ngd_dist.exact import EnergyNGD
from ngd_workers.train.own_loop import LoopContext


def solution(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x[..., 0]) * torch.sin(math.pi * x[..., 1])


RESIDUALS = {
    "interior": lambda u, x: jacrev(grad(u))(x).trace() + 2 * math.pi**2 * solution(x),
    "boundary": lambda u, x: u(x),
}


def train(context: LoopContext) -> None:
    """Solves Poisson's equation on the unit square; each rank takes its own part of the points."""
    width, size = context.config["width"], context.config["points"]
    model = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1)).double().to(context.device)
    optimizer = EnergyNGD(model, RESIDUALS, EnergyNGDConfig(part_weights={"boundary": 4.0}))
    if (state := context.resume()) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    grid = torch.cartesian_prod(*[torch.linspace(0, 1, size, dtype=torch.float64, device=context.device)] * 2)
    is_inside = ((grid > 0) & (grid < 1)).all(1)
    mine = slice(context.rank, None, context.world_size)
    points = {"interior": grid[is_inside][mine], "boundary": grid[~is_inside][mine]}
    while context.step < context.config["steps"]:
        context.report({"loss": optimizer.step(points)}, samples=len(grid))
        is_tested = context.step % 10 == 0
        if is_tested:
            with torch.no_grad():
                error = (model(grid)[:, 0] - solution(grid)).norm() / solution(grid).norm()
            context.report({"error": error}, test=True)
        stops = context.should_stop()
        if is_tested or stops:
            context.checkpoint({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        if stops:
            return
