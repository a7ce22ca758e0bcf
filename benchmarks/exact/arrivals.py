"""Waves through three layers whose slowness is sought from the records of three receivers: who skips cycles?

A record is one pulse of several swings. If a guess is late by half a period or more, the nearest swings that fit are
the wrong ones: a minimum of the squared error, with nothing lower around it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ngd_dist.exact.metrics import L2, FisherRao, Grid, Metric, SideBySide, Sobolev, Wasserstein
from ngd_dist.exact.state_space import StateSpaceNGD

__all__ = ["METHODS", "arrivals"]

LAYERS, K, H, FREQUENCY = 3, 200, 0.02, 2.0
STEPS, SOLVED = 30, 1e-2
LINE, TIMES = Grid((K,), (H,)), (torch.arange(K, dtype=torch.float64) + 0.5) * H
SHARPNESS = 4.0  # of the density: its least value is far from 0, and a swing down differs from silence
Loss = Callable[[Tensor, Tensor], Tensor]


def records(slowness: Tensor) -> Tensor:
    """Returns a Ricker wavelet at the time when the wave has crossed each layer, [LAYERS * K]."""
    late = torch.pi * FREQUENCY * (TIMES - 0.4 - slowness.cumsum(0)[:, None])
    return ((1 - 2 * late**2) * torch.exp(-(late**2))).flatten()


def densities(slowness: Tensor) -> Tensor:
    """Returns the records as densities: signed waves have no transport."""
    positive = softplus(SHARPNESS * records(slowness).view(LAYERS, K))
    return (positive / (positive.sum(1, keepdim=True) * H)).flatten()


def squared_error(rho: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (rho - target).square().sum() * H


def coarse_error(rho: Tensor, target: Tensor) -> Tensor:
    """Returns half the squared H^-1 distance."""
    return 0.5 * METRICS["H^-1"].at(target).apply(rho - target).square().sum()


def transport(rho: Tensor, target: Tensor) -> Tensor:
    """Returns half the squared Wasserstein distance, by the quantiles of the target."""
    total = rho.new_zeros(())
    for record, goal in zip(rho.view(LAYERS, K), target.view(LAYERS, K), strict=True):
        left, of_goal = (of.cumsum(0) * H - of * H / 2 for of in (record, goal))
        after = torch.searchsorted(of_goal, left.detach()).clamp(1, K - 1)
        share = (left - of_goal[after - 1]) / of_goal.diff()[after - 1].clamp_min(1e-12)
        place = TIMES[after - 1] + H * share.clamp(0, 1)
        total = total + 0.5 * ((TIMES - place).square() * record).sum() * H
    return total


METRICS: dict[str, Metric] = {
    name: SideBySide(metric, LAYERS)
    for name, metric in {
        "L2": L2(LINE),
        "H^1": Sobolev(LINE, order=1),
        "H^-1": Sobolev(LINE, order=-1),
        "Fisher-Rao": FisherRao(LINE, floor=1e-6),
        "Wasserstein": Wasserstein(LINE, floor=1e-6),
    }.items()
}
# Loss, state, metric; "plain" is the gradient.
METHODS: list[tuple[Loss, Callable[[Tensor], Tensor], str]] = [
    *((squared_error, records, name) for name in ("plain", "L2", "H^1", "H^-1")),
    *((coarse_error, records, name) for name in ("plain", "L2", "H^-1")),
    *((transport, densities, name) for name in ("plain", "L2", "H^-1", "Fisher-Rao", "Wasserstein")),
]


def arrivals(longest: float, seed: int) -> list[dict[str, Any]]:
    """Returns the largest error of a layer under each loss and metric; longest: the first length of the line search."""
    generator = torch.Generator().manual_seed(seed)
    truth, start = (0.4 + 0.5 * torch.rand(LAYERS, generator=generator, dtype=torch.float64) for _ in range(2))
    lengths = [longest * 0.5**i for i in range(20)]
    rows = []
    for loss_of, state, name in METHODS:
        target, theta = state(truth), start
        loss = lambda rho, loss_of=loss_of, target=target: loss_of(rho, target)  # noqa: E731
        slope = torch.func.grad(lambda theta, state=state, loss=loss: loss(state(theta)))
        for _ in range(STEPS):
            if name == "plain":
                trials = [theta, *(theta - length * slope(theta) for length in lengths)]
                theta = min(trials, key=lambda trial, state=state, loss=loss: float(loss(state(trial))))
            else:
                optimizer = StateSpaceNGD(METRICS[name], state, loss, lr=longest, halvings=len(lengths) - 1)
                theta = optimizer.step(theta).theta
        error = float((theta - truth).abs().max())
        shift = float((start - truth).cumsum(0).abs().max())
        rows.append(
            {"loss": loss_of.__name__, "metric": name, "longest": longest, "seed": seed, "error": error, "shift": shift}
        )
    return rows  # fmt: skip
