"""Small networks with residuals, and dense references that share no code with the library."""

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev

from ngd_dist.exact import Field

WEIGHTS = {"boundary": 4.0}


def solution(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x[..., 0]) * torch.sin(math.pi * x[..., 1])


def interior(u: Field, x: Tensor) -> Tensor:
    """Laplacian of u = that of the solution. By two reverse passes: forward ones make torch warn on their first use."""
    return jacrev(grad(u))(x).trace() + 2 * math.pi**2 * solution(x)


def boundary(u: Field, x: Tensor) -> Tensor:
    return u(x)


POISSON = {"interior": interior, "boundary": boundary}


def network(hidden: int, seed: int = 0, *, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Returns the network of the paper: its weights and biases are drawn from 0.1 N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, 1)).to(dtype)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.1, generator=generator)
    return model


def grid_points(side: int) -> dict[str, Tensor]:
    """Returns the inner points of a grid of the unit square, and those of its sides."""
    line = torch.linspace(0, 1, side, dtype=torch.float64)
    zero, one = torch.zeros_like(line), torch.ones_like(line)
    sides = [(line, zero), (line, one), (zero, line), (one, line)]
    return {
        "interior": torch.cartesian_prod(line[1:-1], line[1:-1]),
        "boundary": torch.cat([torch.stack(pair, dim=1) for pair in sides]),
    }


def relative_error(model: nn.Module) -> float:
    """Returns the relative L2 error on a grid of 101 by 101."""
    line = torch.linspace(0, 1, 101, dtype=torch.float64)
    points = torch.cartesian_prod(line, line)
    with torch.no_grad():
        return float((model(points)[:, 0] - solution(points)).norm() / solution(points).norm())


def dense_system(model: nn.Module, points: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns J [N, W] and r [N] of the whole weighted problem, by autograd on batches."""
    names = [name for name, _ in model.named_parameters()]
    values = tuple(weight.detach() for weight in model.parameters())

    def residuals(*weights: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return functional_call(model, dict(zip(names, weights, strict=True)), (x,))[:, 0]

        x = points["interior"].clone().requires_grad_()
        (slopes,) = torch.autograd.grad(run(x).sum(), x, create_graph=True)
        laplacian = sum(
            torch.autograd.grad(slopes[:, k].sum(), x, create_graph=True)[0][:, k] for k in range(x.shape[1])
        )
        inner = laplacian + 2 * math.pi**2 * solution(points["interior"])
        sides = run(points["boundary"]) * (WEIGHTS["boundary"] / len(points["boundary"])) ** 0.5
        return torch.cat([inner / len(inner) ** 0.5, sides])

    jacobians = torch.autograd.functional.jacobian(residuals, values)
    return torch.cat([part.flatten(1) for part in jacobians], dim=1), residuals(*values).detach()
