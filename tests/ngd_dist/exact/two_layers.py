"""The two-layer network of [Zhang, Martens & Grosse, arXiv 1905.10961] under the exact and the K-FAC gradient."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import EnergyNGDConfig, Exact, FixedInterval, Gaussian
from ngd_dist.exact import EnergyNGD, Field

DAMPING = 1e-10  # beside a G of rank N in width x width, so that its inverse exists


class TwoLayers(nn.Module):
    """f = a . relu(W x) / sqrt(m), a fixed."""

    def __init__(self, width: int, dim: int, generator: torch.Generator) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, width, bias=False, dtype=torch.float64)
        nn.init.normal_(self.hidden.weight, generator=generator)
        signs = torch.randint(2, (width,), generator=generator) * 2.0 - 1
        self.register_buffer("a", signs.double() / width**0.5)

    def forward(self, x: Tensor) -> Any:
        return torch.relu(self.hidden(x)) @ self.a


def inputs(generator: torch.Generator, points: int, dim: int, decades: float = 0.0) -> Tensor:
    """Returns inputs [N, d] of norm 1 whose coordinates shrink by so many decades from the first to the last."""
    x = torch.randn(points, dim, dtype=torch.float64, generator=generator)
    x *= torch.logspace(0, -decades, dim, dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True)


def exact_residuals(model: nn.Module, x: Tensor, y: Tensor, lr: float) -> Iterator[Tensor]:
    """Yields u - y, [N], at the start and after each step theta - lr J^T (J J^T)^-1 (u - y)."""

    def miss(u: Field, point: Tensor) -> Tensor:
        return u(point[:-1]) - point[-1]

    optimizer = EnergyNGD(model, {"data": miss}, EnergyNGDConfig(lr=lr, line_search=None, damping=0.0, form="kernel"))
    while True:
        yield model(x).detach() - y
        optimizer.step({"data": torch.cat([x, y[:, None]], dim=1)})


def kfac_residuals(model: nn.Module, x: Tensor, y: Tensor, lr: float) -> Iterator[Tensor]:
    """Yields the same for K-FAC: theta - lr ((X^T X) (x) (S^T S))^-1 J^T (u - y).

    NGD divides X^T X, S^T S and the gradient by N each, so that its lr is that of the paper by N.
    """
    fisher, always = Exact(likelihood=Gaussian()), FixedInterval(steps=1)
    config = NGDConfig(lr=lr / len(x), momentum=0.0, damping=DAMPING, fisher=fisher, staleness=always)
    optimizer = NGD(model, config)
    while True:
        optimizer.zero_grad()
        output = model(x)
        yield output.detach() - y
        optimizer.fisher_backward(output[:, None])
        (0.5 * (output - y).square().mean()).backward()
        optimizer.step()


def ratios(residuals: Iterator[Tensor], steps: int) -> list[float]:
    """Returns the ratio of |u - y|^2 after and before each step."""
    losses = [float(residual.square().sum()) for residual in itertools.islice(residuals, steps + 1)]
    return [after / before for before, after in itertools.pairwise(losses)]


def largest_eigenvalue(x: Tensor) -> float:
    """Returns lambda_max(X^T X)."""
    return float(torch.linalg.matrix_norm(x, ord=2)) ** 2
