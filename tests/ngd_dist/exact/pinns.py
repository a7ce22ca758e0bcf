"""Poisson's equation for small networks, and its dense reference, which shares no code with the library."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.exact import problems

POISSON, WEIGHTS = problems.POISSON.parts, problems.POISSON.weights


def network(hidden: int, seed: int = 0, *, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return problems.POISSON.network(seed, hidden=hidden).to(dtype)


def grid_points(side: int) -> dict[str, Tensor]:
    return problems.POISSON.points(side, None)


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
        inner = laplacian + 2 * torch.pi**2 * torch.sin(torch.pi * points["interior"]).prod(1)
        sides = run(points["boundary"]) * (WEIGHTS["boundary"] / len(points["boundary"])) ** 0.5
        return torch.cat([inner / len(inner) ** 0.5, sides])

    jacobians = torch.autograd.functional.jacobian(residuals, values)
    return torch.cat([part.flatten(1) for part in jacobians], dim=1), residuals(*values).detach()
