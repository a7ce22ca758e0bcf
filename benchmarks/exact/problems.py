"""Equations with known solutions, for networks of one hidden layer: residuals or energy, points, error.

The networks, points and steps are those of arXiv 2302.13163, except where a line says otherwise.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from ngd_dist.config import EnergyNGDConfig
from ngd_dist.exact import Energy, Field, Residual

__all__ = ["BURGERS", "DEEP_RITZ", "HEAT", "POISSON", "POISSON_5D", "PROBLEMS", "SEMILINEAR", "Problem"]

ERROR_POINTS = 10_000
DIFFUSIVITY = 0.25  # of the heat equation
VISCOSITY, SHARPNESS = 0.1, 2.0  # of Burgers' equation; the solution's front is the steeper the nearer the latter is 1

Points = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A network for the solution of one equation, float64.

    parts: by name, what the loss is made of; weights: the factors of their means, 1 for a part without.
    momentum: that of `EnergyNGD` on it.
    points: (size, generator) -> the points [N, d] of each part, of this size if nothing else is said.
    is_fresh: whether each step draws points of its own; else the points are a grid.
    solution: [..., d] -> [...]; domain: the lowest and highest value of all coordinates.
    """

    name: str
    parts: Mapping[str, Residual | Energy]
    points: Callable[[int, Generator | None], Points]
    solution: Callable[[Tensor], Tensor]
    size: int
    dim: int
    hidden: int
    steps: int
    is_fresh: bool = False
    weights: dict[str, float] = field(default_factory=dict)
    momentum: float = 0.0
    domain: tuple[float, float] = (0.0, 1.0)

    def config(self) -> EnergyNGDConfig:
        return EnergyNGDConfig(part_weights=self.weights, momentum=self.momentum)

    def network(self, seed: int, *, hidden: int | None = None) -> nn.Sequential:
        """Returns the network, with weights and biases drawn from 0.1 N(0, 1)."""
        width, generator = hidden or self.hidden, torch.Generator().manual_seed(seed)
        model = nn.Sequential(nn.Linear(self.dim, width), nn.Tanh(), nn.Linear(width, 1)).double()
        for weight in model.parameters():
            nn.init.normal_(weight, std=0.1, generator=generator)
        return model

    def loss(self, model: nn.Module, points: Points) -> Tensor:
        """Returns the loss that `EnergyNGD` minimises, differentiable by the weights, for other optimizers."""

        def u(x: Tensor) -> Tensor:
            output: Tensor = functional_call(model, dict(model.named_parameters()), (x.unsqueeze(0),))
            return output.squeeze()

        def at(part: Residual | Energy, x: Tensor) -> Tensor:
            return part.density(part.jet(u, x), x) if isinstance(part, Energy) else part(u, x).square().sum()

        means = [
            self.weights.get(name, 1.0) * vmap(lambda x, part=part: at(part, x))(points[name]).mean()
            for name, part in self.parts.items()
        ]
        return torch.stack(means).sum()

    @torch.no_grad()
    def relative_error(self, model: nn.Module) -> float:
        """Returns the relative L2 error at points that are drawn once."""
        low, high = self.domain
        x = _uniform(ERROR_POINTS, self.dim, torch.Generator().manual_seed(2302)) * (high - low) + low
        truth = self.solution(x)
        return float((model(x)[:, 0] - truth).norm() / truth.norm())


# --- Poisson's equation -----------------------------------------------------------------------------------------------


def _product_of_sines(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x).prod(-1)


def _square_grid(side: int, generator: Generator | None = None) -> Points:
    """Returns the inner points of a grid of the unit square, and those of its sides."""
    line = _line(side)
    zero, one = torch.zeros_like(line), torch.ones_like(line)
    sides = [(line, zero), (line, one), (zero, line), (one, line)]
    return {
        "interior": torch.cartesian_prod(line[1:-1], line[1:-1]),
        "boundary": torch.cat([torch.stack(pair, dim=1) for pair in sides]),
    }


POISSON = Problem(
    name="Poisson 2-D",
    # Laplacians by two reverse passes: forward ones make torch warn on their first use.
    parts={
        "interior": lambda u, x: jacrev(grad(u))(x).trace() + 2 * math.pi**2 * _product_of_sines(x),
        "boundary": lambda u, x: u(x),
    },
    weights={"boundary": 4.0},  # the length of the boundary
    points=_square_grid,
    solution=_product_of_sines,
    size=30,
    dim=2,
    hidden=32,
    steps=300,  # the paper takes 51
)


def _semilinear(u: Field, x: Tensor) -> Tensor:
    """Returns by how much u misses u^3 - Laplacian of u = f, with f that of the product of sines."""
    truth = _product_of_sines(x)
    return u(x) ** 3 - jacrev(grad(u))(x).trace() - truth**3 - 2 * math.pi**2 * truth


SEMILINEAR = replace(  # not in the paper
    POISSON, name="semilinear 2-D", parts={"interior": _semilinear, "boundary": lambda u, x: u(x)}, size=20
)


def _sum_of_sines(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x).sum(-1)


def _cube(size: int, generator: Generator | None) -> Points:
    """Returns `size` points of the unit cube in five dimensions, and an eighth as many of its faces."""
    faces = _uniform(size // 8, 5, generator)
    axes = torch.randint(5, (len(faces),), generator=generator)
    faces[torch.arange(len(faces)), axes] = torch.randint(2, (len(faces),), generator=generator).double()
    return {"interior": _uniform(size, 5, generator), "boundary": faces}


POISSON_5D = Problem(
    name="Poisson 5-D",
    parts={
        "interior": lambda u, x: jacrev(grad(u))(x).trace() + math.pi**2 * _sum_of_sines(x),
        "boundary": lambda u, x: u(x) - _sum_of_sines(x),
    },
    points=_cube,
    solution=_sum_of_sines,
    size=4000,
    dim=5,
    hidden=64,
    steps=201,
    is_fresh=True,
)


# --- equations in time; coordinates are (t, x) ------------------------------------------------------------------------


def _cylinder(side: int, generator: Generator | None = None) -> Points:
    """Returns the inner points of a grid of times and places, those of both ends, and those of the start."""
    line = _line(side)
    ends = [torch.stack([line, torch.full_like(line, x)], dim=1) for x in (0.0, 1.0)]
    return {
        "interior": torch.cartesian_prod(line[1:], line[1:-1]),
        "boundary": torch.cat(ends),
        "start": torch.stack([torch.zeros_like(line), line], dim=1),
    }


def _cooling(x: Tensor) -> Tensor:
    return torch.exp(-DIFFUSIVITY * math.pi**2 * x[..., 0]) * torch.sin(math.pi * x[..., 1])


def _heat(u: Field, x: Tensor) -> Tensor:
    return grad(u)(x)[0] - DIFFUSIVITY * jacrev(grad(u))(x)[1, 1]


HEAT = Problem(
    name="heat 1-D",
    parts={
        "interior": _heat,
        "boundary": lambda u, x: u(x),
        "start": lambda u, x: u(x) - _cooling(x),
    },
    points=_cylinder,
    solution=_cooling,
    size=20,  # ours, as is the momentum
    dim=2,
    hidden=64,
    steps=300,  # the paper takes 2,000
    momentum=0.8,
)


def _front(x: Tensor) -> Tensor:
    """Returns the Cole-Hopf transform -2 nu (log w)_x of w = a + exp(-nu pi² t) cos(pi x), which conducts heat."""
    decay = torch.exp(-VISCOSITY * math.pi**2 * x[..., 0])
    potential = SHARPNESS + decay * torch.cos(math.pi * x[..., 1])
    return 2 * VISCOSITY * math.pi * decay * torch.sin(math.pi * x[..., 1]) / potential


def _burgers(u: Field, x: Tensor) -> Tensor:
    slope = grad(u)(x)
    return slope[0] + u(x) * slope[1] - VISCOSITY * jacrev(grad(u))(x)[1, 1]


BURGERS = Problem(  # not in the paper
    name="Burgers 1-D",
    parts={
        "interior": _burgers,
        "boundary": lambda u, x: u(x),
        "start": lambda u, x: u(x) - _front(x),
    },
    points=_cylinder,
    solution=_front,
    weights={"boundary": 100.0, "start": 100.0},
    size=20,
    dim=2,
    hidden=32,
    steps=300,
    momentum=0.8,
)


# --- a nonlinear energy -----------------------------------------------------------------------------------------------


def _cosine(x: Tensor) -> Tensor:
    return torch.cos(math.pi * x).squeeze(-1)


def _ritz(jet: Tensor, x: Tensor) -> Tensor:
    """Returns v'²/2 + v⁴/4 - f v; f is such that the solution of -u'' + u³ = f, u' = 0 at both ends, is the cosine."""
    v, slope = jet
    f = math.pi**2 * _cosine(x) + _cosine(x) ** 3
    return slope**2 / 2 + v**4 / 4 - f * v


def _midpoints(cells: int, generator: Generator | None = None) -> Points:
    """Returns the middles of equal cells of [-1, 1]: a mean over them is of second order, as the trapezoid rule."""
    return {"interior": ((torch.arange(cells, dtype=torch.float64) + 0.5) * 2 / cells - 1).unsqueeze(1)}


DEEP_RITZ = Problem(
    name="nonlinear Deep Ritz 1-D",
    parts={"interior": Energy(jet=lambda u, x: torch.stack([u(x), *grad(u)(x)]), density=_ritz)},
    weights={"interior": 2.0},  # the length of the domain
    points=_midpoints,
    solution=_cosine,
    size=2000,  # the paper has 20,000; the error is that of the network at a tenth of them
    dim=1,
    hidden=32,
    steps=101,
    domain=(-1.0, 1.0),
)

PROBLEMS = (POISSON, SEMILINEAR, HEAT, BURGERS, DEEP_RITZ, POISSON_5D)


def _uniform(count: int, dim: int, generator: Generator | None) -> Tensor:
    return torch.rand(count, dim, dtype=torch.float64, generator=generator)


def _line(side: int) -> Tensor:
    return torch.linspace(0, 1, side, dtype=torch.float64)
