"""Mixup and random erasing of a batch of images on its device.

Random numbers come from torch's generator of the CPU, so that they are the same on every kind of device; the loop seeds
it for each step and rank. Source: [OT20], and its code for the order of the two and for the numbers.
"""

import torch
from torch import Tensor
from torch.distributions import Beta

from ngd_workers.contract.spec import Erasing, Mixup

__all__ = ["Mixer", "erased"]


class Mixer:
    """Mixes each sample with another one. It keeps the last mixed batch on the device, and no checkpoint holds it."""

    def __init__(self, choice: Mixup) -> None:
        self._choice = choice
        self._previous: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Returns both, mixed with the same weights. x: [N, ...]; target: [N, classes], in the dtype of x."""
        lam = Beta(self._choice.alpha, self._choice.alpha).sample((len(x),))
        lam = torch.maximum(lam, 1 - lam).to(x.device, x.dtype, non_blocking=True)
        others = self._others(x, target)
        mixed = (x, target) if others is None else (_mean(lam, x, others[0]), _mean(lam, target, others[1]))
        if self._choice.kind == "running":
            self._previous = mixed
        return mixed

    def _others(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor] | None:
        if self._choice.kind == "batch":
            order = torch.randperm(len(x)).to(x.device)
            return x[order], target[order]
        if self._previous is None:
            return None
        # Lengths differ where bad samples are left out.
        rows = torch.arange(len(x), device=x.device) % len(self._previous[0])
        return self._previous[0][rows], self._previous[1][rows]


def erased(choice: Erasing, x: Tensor) -> Tensor:
    """Returns images [N, channels, height, width], of which some have lost a rectangle to zeros."""
    count, (height, width) = len(x), x.shape[-2:]
    area = _uniform(count, choice.min_area, choice.max_area) * height * width
    aspect = _uniform(count, choice.min_aspect, 1.0)
    sides = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()])
    sides = torch.where(torch.rand(count) < 0.5, sides, sides.flip(0)).round().long()
    tall, wide = sides[0].clamp(max=height), sides[1].clamp(max=width)
    tall = torch.where(torch.rand(count) < choice.probability, tall, 0)
    rows = _within(height, _start(height - tall), tall)
    columns = _within(width, _start(width - wide), wide)
    lost = rows[:, None, :, None] & columns[:, None, None, :]
    return x.masked_fill(lost.to(x.device, non_blocking=True), 0)


def _mean(lam: Tensor, one: Tensor, other: Tensor) -> Tensor:
    lam = lam.view(-1, *[1] * (one.ndim - 1))
    return torch.lerp(other, one, lam)


def _uniform(count: int, low: float, high: float) -> Tensor:
    return torch.rand(count) * (high - low) + low


def _start(room: Tensor) -> Tensor:
    """Returns whole numbers in [0, room], each as likely."""
    return (torch.rand(len(room)) * (room + 1)).long()


def _within(length: int, start: Tensor, size: Tensor) -> Tensor:
    """Returns true at `size` places from `start` on: [N, length]."""
    places = torch.arange(length)
    return (places >= start[:, None]) & (places < (start + size)[:, None])
