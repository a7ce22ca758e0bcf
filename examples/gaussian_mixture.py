"""Fits a Gaussian mixture's density by two losses under five metrics. Run: python examples/gaussian_mixture.py"""

import sys

import torch
from torch import Tensor

from ngd_dist.exact.metrics import L2, FisherRao, Grid, Sobolev, Wasserstein
from ngd_dist.exact.state_space import StateSpaceNGD

STEPS, K, H = 30, 200, 0.1
GRID, X = Grid((K,), (H,)), (torch.arange(K, dtype=torch.float64) + 0.5) * H - 10
METRICS = {"L2": L2(GRID), "Fisher-Rao": FisherRao(GRID, floor=1e-6), "Wasserstein": Wasserstein(GRID, floor=1e-6)}
METRICS |= {f"H^{order}": Sobolev(GRID, order=order) for order in (1, -1)}


def density(theta: Tensor) -> Tensor:
    """Returns the mixture of three means, widths and weights, each without bounds; one weight is redundant."""
    means, widths, weights = theta.view(3, 3, 1)
    widths = 0.3 + 1.7 * widths.sigmoid()
    rho = (weights.softmax(0) / widths * torch.exp(-0.5 * ((X - means) / widths) ** 2)).sum(0)
    return rho / (rho.sum() * H)


def squared_error(rho: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (rho - target).square().sum() * H


def transport(rho: Tensor, target: Tensor) -> Tensor:
    """Returns half the squared Wasserstein distance: each place goes where the target has as much mass on its left."""
    left, goal = rho.cumsum(0) * H - rho * H / 2, target.cumsum(0) * H - target * H / 2
    after = torch.searchsorted(goal, left.detach()).clamp(1, K - 1)
    share = (left - goal[after - 1]) / goal.diff()[after - 1].clamp_min(1e-12)
    return 0.5 * ((X - X[after - 1] - H * share.clamp(0, 1)).square() * rho).sum() * H


def draw(seed: int) -> Tensor:
    unit = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (unit * torch.tensor([[3.0], [0.5], [0.5]])).flatten()


def fit(loss_of, name: str, seed: int) -> list[float]:
    """Returns the loss after each step, relative to the first. Every rival may choose among the same 20 lengths."""
    target, theta, losses = density(draw(2 * seed)), draw(2 * seed + 1), []
    start, loss = loss_of(density(theta), target), lambda rho: loss_of(rho, target)
    slope = torch.func.grad(lambda theta: loss(density(theta)))
    optimizer = StateSpaceNGD(METRICS.get(name, L2(GRID)), density, loss, damping=1e-3, lr=2**7, halvings=19)
    for _ in range(STEPS):
        trials = (theta - 2.0**i * slope(theta) for i in range(-12, 8))
        theta = min(trials, key=lambda trial: loss(density(trial))) if name == "plain" else optimizer.step(theta).theta
        losses.append(float(loss(density(theta)) / start))
    return losses


if __name__ == "__main__":
    seeds = int(sys.argv[1]) if sys.argv[1:] else 3
    for loss_of in (squared_error, transport):
        for name in ("plain", *METRICS):
            losses = torch.tensor([fit(loss_of, name, seed)[-1] for seed in range(seeds)])
            print(f"{loss_of.__name__:13} {name:11} loss {losses.median():.8f}; {(losses < 1e-4).sum()}/{seeds} solved")
