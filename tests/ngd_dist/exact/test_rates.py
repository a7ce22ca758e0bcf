"""Rates of the exact natural gradient of overparameterised networks [Zhang, Martens & Grosse, arXiv 1905.10961]."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ngd_dist.config import EnergyNGDConfig
from ngd_dist.exact import EnergyNGD, Field

POINTS, DIM = 64, 10
STEPS = 5


class TwoLayers(nn.Module):
    """f = a . relu(W x) / sqrt(m), a fixed."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(width, DIM, dtype=torch.float64, generator=generator))
        signs = torch.randint(2, (width,), generator=generator) * 2.0 - 1
        self.register_buffer("a", signs.double() / width**0.5)

    def forward(self, x: Tensor) -> Any:
        return torch.relu(x @ self.W.T) @ self.a


def miss(u: Field, point: Tensor) -> Tensor:
    """Returns u(x) - y of a point (x, y)."""
    return u(point[:-1]) - point[-1]


def ratios(width: int, lr: float, *, noise: bool = False) -> list[float]:
    """Returns the ratio of |u - y|² after and before each step theta - lr Jᵀ(JJᵀ)⁻¹(u - y)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(POINTS, DIM, dtype=torch.float64, generator=generator)
    x /= x.norm(dim=1, keepdim=True)
    y = torch.randn(POINTS, 1, dtype=torch.float64, generator=generator) if noise else torch.sin(3 * x[:, :1])
    config = EnergyNGDConfig(lr=lr, line_search=None, damping=0.0, form="kernel")
    optimizer = EnergyNGD(TwoLayers(width, generator), {"data": miss}, config)
    points = {"data": torch.cat([x, y], dim=1)}

    losses = [optimizer.step(points) for _ in range(STEPS)] + [optimizer.loss(points)]
    return [after / before for before, after in itertools.pairwise(losses)]


def off(found: list[float], lr: float) -> float:
    return max(abs(ratio - (1 - lr) ** 2) for ratio in found)


@pytest.mark.parametrize("lr", [0.1, 0.5])
@pytest.mark.parametrize("width", [1024, 4096])
def test_squared_residual_falls_by_the_rate_of_a_linear_model(width: int, lr: float) -> None:
    found = ratios(width, lr)

    assert max(found) <= 1 - lr
    assert off(found, lr) < 0.01


def test_targets_of_pure_noise_need_more_width_for_that_rate() -> None:
    narrow, wide = (ratios(width, 0.5, noise=True) for width in (1024, 16384))

    assert max(narrow) <= 0.5
    assert off(wide, 0.5) < 0.01 < off(narrow, 0.5)


def test_full_step_of_a_wide_network_all_but_solves() -> None:
    assert ratios(4096, 1.0)[0] < 1e-2
