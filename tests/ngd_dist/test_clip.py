"""Factors that bound a step, against the dense quadratic form that they bound."""

import pytest
import torch
from torch import Tensor

from ngd_dist.step.length import kl_factor, norm_factor
from tests.support.tensors import F64

LRS = [0.3, 0.05]


def layers(scale: float) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Returns, for two layers, F, a gradient and the direction F^-1 gradient."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for n in (4, 6):
        rows = torch.randn(2 * n, n, dtype=F64, generator=generator)
        fisher = rows.T @ rows / (2 * n)
        gradient = scale * torch.randn(n, dtype=F64, generator=generator)
        found.append((fisher, gradient, torch.linalg.solve(fisher, gradient)))
    return found


def inner(found: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    return torch.stack([lr**2 * (u @ g) for lr, (_, g, u) in zip(LRS, found, strict=True)]).sum()


def steps_kl(found: list[tuple[Tensor, Tensor, Tensor]], factor: Tensor) -> float:
    """Returns the sum over layers of step^T F step, twice the KL divergence, for steps of lr * factor * direction."""
    steps = [lr * factor * u for lr, (_, _, u) in zip(LRS, found, strict=True)]
    return sum(float(step @ fisher @ step) for step, (fisher, _, _) in zip(steps, found, strict=True))


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_kl_clip_shortens_a_step_to_exactly_its_bound(scale: float) -> None:
    found = layers(scale)

    factor = kl_factor(inner(found), 1e-3)

    assert factor < 1
    assert steps_kl(found, factor) == pytest.approx(1e-3, rel=1e-12)


def test_kl_clip_leaves_a_short_step_alone() -> None:
    found = layers(1e-3)

    factor = kl_factor(inner(found), 1e-3)

    assert factor == 1
    assert 0 < steps_kl(found, factor) <= 1e-3


@pytest.mark.parametrize(("value", "factor"), [(0.0, 1.0), (4.0, 0.5), (-4.0, 0.5), (0.25, 1.0)])
def test_kl_clip_is_the_formula(value: float, factor: float) -> None:
    assert kl_factor(torch.tensor(value, dtype=F64), 1.0) == factor


def test_norm_clip_bounds_the_norm_over_all_directions() -> None:
    directions = [torch.full((2, 3), 3.0, dtype=F64), torch.full((4,), -2.0)]
    together = torch.cat([d.flatten().double() for d in directions])

    factor = norm_factor(directions, 0.7)

    assert (factor * together).norm().item() == pytest.approx(0.7, rel=1e-14)
    assert norm_factor(directions, 9.0) == 1  # the norm is sqrt(70)


def test_norm_clip_leaves_zero_alone() -> None:
    assert norm_factor([torch.zeros(3)], 1.0) == 1


def test_norm_clip_does_not_overflow_in_half_precision() -> None:
    directions = [torch.full((1024,), 6e4, dtype=torch.float16)]

    assert norm_factor(directions, 1.0).item() == pytest.approx(1 / (32 * 6e4), rel=1e-3)  # 6e4 is rounded to float16


def test_factors_read_nothing_back_from_the_device() -> None:
    direction = torch.empty(3, device="meta")  # any number asked of a meta tensor is an error

    assert kl_factor(direction.sum(), 1.0).is_meta
    assert norm_factor([direction], 1.0).is_meta
