"""Damping: its split over the factors, its schedules, its adaptation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ngd_dist.config import ConstantDamping, ExponentialDamping, LevenbergMarquardt, PolynomialDamping
from ngd_dist.factors.kronecker import pi_split
from ngd_dist.step.damping import levenberg_marquardt, reduction_ratio, scheduled
from tests.support.tensors import F64

LM = LevenbergMarquardt(decay=0.9, every=2, low=0.25, high=0.75, minimum=0.1, maximum=10.0)


def spd(blocks: int, n: int, seed: int) -> Tensor:
    rows = torch.randn(blocks, 2 * n, n, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return rows.mT @ rows / (2 * n)


@pytest.mark.parametrize("damping", [1e-8, 1e-3, 10.0])
def test_pi_split_is_the_trace_normalised_form_in_every_block(damping: float) -> None:
    scales = torch.tensor([50.0, 1.0, 1e-4], dtype=F64)
    A, G = spd(3, 6, 0) * scales.view(3, 1, 1), spd(3, 4, 1) * 1e-3
    mean_a, mean_g = A.diagonal(dim1=1, dim2=2).mean(1), G.diagonal(dim1=1, dim2=2).mean(1)

    damping_a, damping_g = pi_split(mean_a, mean_g, damping)

    eye_a, eye_g = torch.eye(6, dtype=F64), torch.eye(4, dtype=F64)
    for b in range(3):
        share = (damping / (mean_a[b] * mean_g[b])).sqrt()
        normalised = (
            mean_a[b] * mean_g[b] * torch.kron(G[b] / mean_g[b] + share * eye_g, A[b] / mean_a[b] + share * eye_a)
        )
        ours = torch.kron(G[b] + damping_g[b] * eye_g, A[b] + damping_a[b] * eye_a)
        torch.testing.assert_close(ours, normalised, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("mean_a", "mean_g"),
    [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (-1.0, 1.0), (-1.0, -4.0), (math.nan, 1.0), (1.0, math.inf), (1e300, 1e-300)],
)
def test_pi_is_one_for_a_dead_block_alone(mean_a: float, mean_g: float) -> None:
    damping_a, damping_g = pi_split(torch.tensor([mean_a, 9.0], dtype=F64), torch.tensor([mean_g, 1.0], dtype=F64), 4.0)

    assert damping_a.tolist() == [2.0, 6.0]
    assert damping_g.tolist() == [2.0, 2.0 / 3.0]


def test_pi_split_reads_nothing_back_from_the_device() -> None:
    mean = torch.empty(3, device="meta")  # any number asked of a meta tensor is an error

    damping_a, _ = pi_split(mean, mean, 1.0)

    assert damping_a.is_meta


@pytest.mark.parametrize("step", [0, 1, 10**6])
def test_constant_damping_stays(step: int) -> None:
    assert scheduled(ConstantDamping(), 0.3, step) == 0.3


def test_exponential_damping_multiplies_by_its_factor_every_so_many_steps() -> None:
    rule = ExponentialDamping(factor=0.25, every=10, minimum=1e-3)

    found = [scheduled(rule, 0.4, step) for step in (0, 5, 10, 20, 10**6)]

    assert found == pytest.approx([0.4, 0.2, 0.1, 0.025, 1e-3], rel=1e-15)


def test_polynomial_damping_ends_at_its_end_and_stays_there() -> None:
    rule = PolynomialDamping(end=0.1, steps=4, power=2.0)

    found = [scheduled(rule, 0.9, step) for step in (0, 1, 2, 4, 5, 10**6)]

    assert found == pytest.approx([0.9, 0.1 + 0.8 * 9 / 16, 0.3, 0.1, 0.1, 0.1], rel=1e-15)


@pytest.mark.parametrize(
    ("rho", "expected"),
    [
        (-1.0, 1 / 0.81),
        (0.2, 1 / 0.81),
        (0.25, 1.0),
        (0.75, 1.0),
        (0.8, 0.81),
        (math.nan, 1 / 0.81),
        (-math.inf, 1 / 0.81),
    ],
)
def test_damping_follows_how_well_the_model_predicted(rho: float, expected: float) -> None:
    assert levenberg_marquardt(LM, 1.0, rho) == pytest.approx(expected, rel=1e-15)


@given(damping=st.floats(1e-3, 1e3), rho=st.floats())
def test_adapted_damping_stays_within_its_bounds(damping: float, rho: float) -> None:
    assert LM.minimum <= levenberg_marquardt(LM, damping, rho) <= LM.maximum


@pytest.mark.parametrize(
    ("loss_change", "model_change", "rho"), [(-0.3, -0.6, 0.5), (0.3, -0.6, -0.5), (-1.2, -0.6, 2.0), (0.0, -0.6, 0.0)]
)
def test_rho_compares_the_change_of_the_loss_with_the_models(
    loss_change: float, model_change: float, rho: float
) -> None:
    assert reduction_ratio(loss_change, model_change) == rho


@pytest.mark.parametrize(
    ("loss_change", "model_change"), [(0.6, 0.6), (-0.6, 0.0), (-0.6, math.nan), (math.nan, -0.6), (math.inf, -0.6)]
)
def test_damping_grows_where_no_decrease_was_predicted_or_the_loss_is_not_finite(
    loss_change: float, model_change: float
) -> None:
    assert levenberg_marquardt(LM, 1.0, reduction_ratio(loss_change, model_change)) > 1
