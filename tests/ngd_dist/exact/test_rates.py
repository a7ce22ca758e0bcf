"""Rates of natural gradients of overparameterised networks [Zhang, Martens & Grosse, arXiv 1905.10961]."""

import itertools

import pytest
import torch
from torch import Tensor

from tests.ngd_dist.exact.two_layers import (
    TwoLayers,
    exact_residuals,
    inputs,
    kfac_residuals,
    largest_eigenvalue,
    ratios,
)

POINTS, DIM = 64, 10
STEPS = 5


def exact_ratios(width: int, lr: float, *, noise: bool = False) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    x = inputs(generator, POINTS, DIM)
    y = torch.randn(POINTS, dtype=torch.float64, generator=generator) if noise else torch.sin(3 * x[:, 0])
    return ratios(exact_residuals(TwoLayers(width, DIM, generator), x, y, lr), STEPS)


def off(found: list[float], lr: float) -> float:
    return max(abs(ratio - (1 - lr) ** 2) for ratio in found)


@pytest.mark.parametrize("lr", [0.1, 0.5])
@pytest.mark.parametrize("width", [1024, 4096])
def test_squared_residual_falls_by_the_rate_of_a_linear_model(width: int, lr: float) -> None:
    found = exact_ratios(width, lr)

    assert max(found) <= 1 - lr
    assert off(found, lr) < 0.01


def test_targets_of_pure_noise_need_more_width_for_that_rate() -> None:
    narrow, wide = (exact_ratios(width, 0.5, noise=True) for width in (1024, 16384))

    assert max(narrow) <= 0.5
    assert off(wide, 0.5) < 0.01 < off(narrow, 0.5)


def test_full_step_of_a_wide_network_all_but_solves() -> None:
    assert exact_ratios(4096, 1.0)[0] < 1e-2


def kfac_case(points: int, decades: float = 0.0) -> tuple[Tensor, Tensor, TwoLayers]:
    generator = torch.Generator().manual_seed(0)
    x = inputs(generator, points, DIM, decades)
    return x, torch.sin(3 * x[:, 0]), TwoLayers(1024, DIM, generator)


@pytest.mark.parametrize("decades", [0.0, 0.5])
def test_kfac_falls_by_the_rate_of_the_inputs_alone(decades: float) -> None:
    """Each residual falls by 1 - h, h = x (X^T X)^-1 x of its point, at least 1 / lambda_max(X^T X): theorem 4."""
    x, y, model = kfac_case(POINTS, decades)
    leverages = (x @ torch.linalg.inv(x.T @ x) * x).sum(1)

    for before, after in itertools.pairwise(itertools.islice(kfac_residuals(model, x, y, 1.0), STEPS + 1)):
        ratio = float(after.square().sum() / before.square().sum())
        predicted = float(((1 - leverages) * before).square().sum() / before.square().sum())
        assert ratio <= 1 - 1 / largest_eigenvalue(x)
        assert ratio == pytest.approx(predicted, abs=0.04)  # the width is finite: 0.03 seen


def test_kfac_is_the_exact_step_if_no_input_depends_on_others() -> None:
    x, y, model = kfac_case(DIM - 2)

    assert ratios(kfac_residuals(model, x, y, 1.0), 1)[0] < 0.05
    assert ratios(kfac_residuals(kfac_case(POINTS)[2], *kfac_case(POINTS)[:2], 1.0), 1)[0] > 0.5
