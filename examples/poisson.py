"""Poisson's equation by the energy natural gradient, beside Adam. Run: python examples/poisson.py"""

import math

import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

from ngd_dist.config import EnergyNGDConfig
from ngd_dist.exact import EnergyNGD

STEPS, ADAM_STEPS = 80, 2000

torch.set_default_dtype(torch.float64)


def solution(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x[..., 0]) * torch.sin(math.pi * x[..., 1])


residuals = {
    "interior": lambda u, x: jacrev(grad(u))(x).trace() + 2 * math.pi**2 * solution(x),
    "boundary": lambda u, x: u(x),
}
line = torch.linspace(0, 1, 20)
zero, one = torch.zeros_like(line), torch.ones_like(line)
sides = [(line, zero), (line, one), (zero, line), (one, line)]
points = {
    "interior": torch.cartesian_prod(line[1:-1], line[1:-1]),
    "boundary": torch.cat([*map(torch.column_stack, sides)]),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 1))


def error(model: nn.Module) -> float:
    x = torch.cartesian_prod(*[torch.linspace(0, 1, 101)] * 2)
    with torch.no_grad():
        return float((model(x)[:, 0] - solution(x)).norm() / solution(x).norm())


model = network()
optimizer = EnergyNGD(model, residuals, EnergyNGDConfig(part_weights={"boundary": 4.0}))
for step in range(STEPS):
    loss = optimizer.step(points)
    if step % 10 == 0 or step == STEPS - 1:
        print(f"step {step} loss {loss:.12f} relative error {error(model):.1e}")

rival = network()
adam = torch.optim.Adam(rival.parameters(), lr=1e-2)
for _ in range(ADAM_STEPS):
    adam.zero_grad()
    inner = vmap(lambda x: residuals["interior"](lambda p: rival(p)[0], x))(points["interior"])
    (inner.square().mean() + 4 * rival(points["boundary"]).square().mean()).backward()
    adam.step()
print(f"Adam, {ADAM_STEPS} steps: relative error {error(rival):.1e}")
