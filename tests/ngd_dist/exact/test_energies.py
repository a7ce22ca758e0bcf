"""Energies that are no sum of squares: the step is Newton's in function space, projected on the network's tangents."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad

from benchmarks.exact.problems import DEEP_RITZ, POISSON
from ngd_dist.config import EnergyNGDConfig
from ngd_dist.errors import ConfigError, NonFiniteError
from ngd_dist.exact import Energy, EnergyNGD
from tests.support.ranks import run_ranks

POINTS = DEEP_RITZ.points(50, None)
DAMPING = 1e-3


def settings(**changes: Any) -> EnergyNGDConfig:
    fixed = {"damping": DAMPING, "damping_factor": 1.0, "part_weights": DEEP_RITZ.weights}
    return EnergyNGDConfig(**{**fixed, **changes})


def flat(model: nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def network(seed: int = 0) -> nn.Sequential:
    """Returns a small one whose values are far from 0, so that the energy's third derivative counts."""
    model = DEEP_RITZ.network(seed, hidden=5)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 10
    return model


def dense_system(model: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns G [W, W], the gradient [W] and E by the paper's formulas, of the points x [N, 1] of [-1, 1].

    G_ij = integral of d_i u' d_j u' + 3 u² d_i u d_j u. The network is u = b + sum_k c_k tanh(w_k x + a_k).
    """
    w, a, c, b = (weight.detach().flatten().requires_grad_() for weight in model.parameters())

    def values(w: Tensor, a: Tensor, c: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        tanh = torch.tanh(x * w + a)
        return tanh @ c + b, (1 - tanh**2) @ (c * w)

    of_u, of_slope = torch.autograd.functional.jacobian(values, (w, a, c, b))
    du_NW, dslope_NW = torch.cat(of_u, dim=1), torch.cat(of_slope, dim=1)
    u, slope = (value.detach() for value in values(w, a, c, b))
    cosine = torch.cos(torch.pi * x[:, 0])
    f = torch.pi**2 * cosine + cosine**3
    step = 2 / len(x)
    gram = step * (dslope_NW.T @ dslope_NW + du_NW.T @ (3 * u.square().unsqueeze(1) * du_NW))
    gradient = step * (dslope_NW.T @ slope + du_NW.T @ (u**3 - f))
    return gram, gradient, step * (slope**2 / 2 + u**4 / 4 - f * u).sum()


def test_step_is_that_of_the_second_variation() -> None:
    model = network()
    before = flat(model)
    gram, gradient, energy = dense_system(model, POINTS["interior"])

    loss = EnergyNGD(model, DEEP_RITZ.parts, settings(lr=0.5, line_search=None)).step(POINTS)

    direction = -torch.linalg.solve(gram / 2 + DAMPING * torch.eye(len(gram)).to(gram), gradient / 2)
    assert loss == pytest.approx(float(energy), rel=1e-12)
    torch.testing.assert_close(flat(model) - before, 0.5 * direction, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("chunk", [7, 1024])
def test_a_residual_is_the_energy_of_its_square(chunk: int) -> None:
    models, points = [POISSON.network(0, hidden=5) for _ in range(2)], POISSON.points(7, None)
    squared = {name: Energy(part, lambda jet, x: jet.square().sum()) for name, part in POISSON.parts.items()}

    for model, parts in zip(models, (POISSON.parts, squared), strict=True):
        optimizer = EnergyNGD(model, parts, settings(part_weights=POISSON.weights, form="weights", chunk=chunk))
        for _ in range(3):
            optimizer.step(points)

    torch.testing.assert_close(*map(flat, models), rtol=0, atol=1e-9)


def test_residuals_and_energies_stand_side_by_side() -> None:
    """u minimises u'^2/2 - u over [0, 1] and is 0 at both ends: x (1 - x) / 2, which the model can be."""

    class Parabola(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.zeros(3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x**2, x, torch.ones_like(x)], dim=1) @ self.weights

    model, ends = Parabola(), torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    energy = Energy(lambda u, x: torch.stack([u(x), *grad(u)(x)]), lambda jet, x: jet[1] ** 2 / 2 - jet[0])
    parts = {"interior": energy, "ends": lambda u, x: u(x)}
    optimizer = EnergyNGD(model, parts, EnergyNGDConfig(damping=0.0, part_weights={"ends": 1e7}, line_search=None))

    optimizer.step({"interior": (POINTS["interior"] + 1) / 2, "ends": ends})

    torch.testing.assert_close(model.weights.data, torch.tensor([-0.5, 0.5, 0.0]).double(), rtol=0, atol=1e-3)


def test_curvature_that_is_not_convex_counts_as_none() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 0.1)
    well = {"data": Energy(lambda u, x: u(x).reshape(1), lambda jet, x: (jet[0] ** 2 - 1) ** 2)}
    optimizer = EnergyNGD(model, well, EnergyNGDConfig())

    losses = [optimizer.step({"data": torch.ones(1, 1).double()}) for _ in range(30)]

    assert losses == sorted(losses, reverse=True)
    assert float(model.weight.detach()) == pytest.approx(1, abs=1e-6)


def test_the_kernel_form_is_refused() -> None:
    with pytest.raises(ConfigError, match="form='kernel' is for residuals alone"):
        EnergyNGD(network(), DEEP_RITZ.parts, settings(form="kernel"))


@pytest.mark.parametrize("power", [-1.0, 1.5], ids=["value", "second derivative"])
def test_an_energy_that_is_not_finite_raises_and_changes_nothing(power: float) -> None:
    model = nn.Linear(1, 1).double()
    before = flat(model)
    bad = {"data": Energy(lambda u, x: (u(x) - u(x).detach()).reshape(1), lambda jet, x: jet[0] ** power)}

    with pytest.raises(NonFiniteError, match="no weight was changed"):
        EnergyNGD(model, bad, EnergyNGDConfig()).step({"data": torch.ones(3, 1).double()})

    assert torch.equal(flat(model), before)


def _on_ranks(rank: int, world_size: int) -> tuple[Tensor, int]:
    model = network(seed=rank)
    optimizer = EnergyNGD(model, DEEP_RITZ.parts, settings())
    for _ in range(3):
        optimizer.step({"interior": POINTS["interior"][rank::world_size]})
    return flat(model), optimizer._comm.take_sent()["statistics"]


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_take_the_step_of_all_their_points(world_size: int) -> None:
    model = network()
    optimizer = EnergyNGD(model, DEEP_RITZ.parts, settings())
    for _ in range(3):
        optimizer.step(POINTS)

    of_ranks = run_ranks(world_size, _on_ranks)

    n = len(flat(model)) + 1  # beside the Gram matrix travel the slope and the loss
    triangle_bytes = 8 * n * (n + 1) // 2
    torch.testing.assert_close(of_ranks[0][0], flat(model), rtol=0, atol=1e-9)
    for weights, sent in of_ranks:
        assert torch.equal(weights, of_ranks[0][0])
        assert sent == 3 * (2 * triangle_bytes * (world_size - 1) // world_size)
