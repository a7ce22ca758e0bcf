"""TKFAC equals its dense formulas in float64, and keeps the trace of the Fisher block."""

import pytest
import torch
from torch import Tensor

from ngd_dist import NGDConfig
from ngd_dist.config import TKFAC
from ngd_dist.factors.cost import LayerShape
from ngd_dist.inversion import Ending
from ngd_dist.preconditioners import Cache, Preconditioner, preconditioner_for
from tests.reference import kronecker
from tests.reference.tkfac import block, direction, factors, layer_fisher
from tests.support.refreshing import refresh
from tests.support.rows import random_rows

BOTH = frozenset({"Phi", "Psi"})
SHAPE = (2, 4, 5)


def method_of(shape: tuple[int, int, int] = SHAPE, max_dense: int = 8192, **settings: str) -> Preconditioner:
    B, O, I = shape  # noqa: E741
    config = NGDConfig.model_validate({"preconditioner": {"kind": "tkfac", **settings}, "max_dense": max_dense})
    return preconditioner_for(LayerShape("layer", "kronecker", I, O, blocks=B), config)


def refreshed(method: Preconditioner, statistics: dict[str, Tensor], damping: float) -> Cache:
    cache = refresh(method, statistics, BOTH, damping, None).cache
    assert cache is not None
    return cache


@pytest.mark.parametrize("positions", [1, 3])
def test_statistics_are_those_of_the_formula(positions: int) -> None:
    method, rows = method_of(), random_rows(SHAPE, samples=7, positions=positions)

    found = method.estimate(rows, BOTH, {})

    for b in range(2):
        delta, Phi, Psi = factors(rows.a_BNPI[b], rows.g_BNPO[b])
        torch.testing.assert_close(found["Phi"][b], delta * Phi, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(found["Psi"][b], delta * Psi, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("max_dense", [8192, 4])
def test_the_trace_of_the_fisher_block_is_kept(max_dense: int) -> None:
    method, rows = method_of(max_dense=max_dense), random_rows(SHAPE, samples=7, positions=3)

    found = method.estimate(rows, BOTH, {})

    for b in range(2):
        exact = layer_fisher(rows.a_BNPI[b], rows.g_BNPO[b]).trace()
        Phi, Psi = (method.statistics[i].form.dense(found[n])[b] for i, n in enumerate(("Phi", "Psi")))
        delta = Phi.trace()
        torch.testing.assert_close(torch.kron(Psi, Phi).trace() / delta, exact, rtol=1e-12, atol=0)


def test_positions_that_are_reduced_keep_the_trace_of_their_samples_fisher() -> None:
    method, rows = method_of(sharing="reduce"), random_rows(SHAPE, samples=7, positions=3)

    found = method.estimate(rows, BOTH, {})

    a, g = kronecker.reduced(rows.a_BNPI, rows.g_BNPO)
    for b in range(2):
        delta, Phi, _ = factors(a[b], g[b])
        torch.testing.assert_close(found["Phi"][b], delta * Phi, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(found["Psi"][b].trace(), layer_fisher(a[b], g[b]).trace(), rtol=1e-12, atol=0)


def test_the_block_of_one_sample_is_its_fisher() -> None:
    rows = random_rows((1, 4, 5), samples=1, positions=1)

    found = block(rows.a_BNPI[0], rows.g_BNPO[0])

    torch.testing.assert_close(found, layer_fisher(rows.a_BNPI[0], rows.g_BNPO[0]), rtol=1e-12, atol=1e-14)


def test_the_block_is_closer_to_the_fisher_than_kfacs_if_samples_differ_in_size() -> None:
    rows = random_rows((1, 4, 5), samples=500, positions=1)
    a, g = rows.a_BNPI[0], rows.g_BNPO[0]
    exact = layer_fisher(a, g)
    A, G = kronecker.factors(rows.a_BNPI, rows.g_BNPO)

    ours, kfacs = (float((x - exact).norm() / exact.norm()) for x in (block(a, g), torch.kron(G[0], A[0])))

    assert ours < 0.9 * kfacs


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("positions", [1, 3])
def test_a_direction_is_the_dense_solve(positions: int, damping: float) -> None:
    method, rows = method_of(), random_rows(SHAPE, samples=20, positions=positions)
    grad = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    found = method.apply(refreshed(method, method.estimate(rows, BOTH, {}), damping), grad)

    for b in range(2):
        exact = direction(grad[b], *factors(rows.a_BNPI[b], rows.g_BNPO[b]), damping)
        torch.testing.assert_close(found[b], exact, rtol=1e-10, atol=1e-10)


def test_factors_of_different_steps_have_the_geometric_mean_of_their_traces() -> None:
    method, rows = method_of((1, 4, 5)), random_rows((1, 4, 5), samples=20, positions=1)
    statistics = method.estimate(rows, BOTH, {})
    grad = torch.randn(1, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    found = method.apply(refreshed(method, statistics | {"Psi": 4 * statistics["Psi"]}, 0.1), grad)

    delta, Phi, Psi = factors(rows.a_BNPI[0], rows.g_BNPO[0])
    torch.testing.assert_close(found[0], direction(grad[0], 2 * delta, Phi, Psi, 0.1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [0.0, 1e-30])
def test_a_layer_without_gradients_gets_the_gradient_over_the_damping(size: float) -> None:
    method = method_of((1, 4, 5))
    rows = random_rows((1, 4, 5), samples=20, positions=1)
    statistics = {n: (size * x).float() for n, x in method.estimate(rows, BOTH, {}).items()}

    result = refresh(method, statistics, BOTH, 0.1, None)

    assert set(result.endings.values()) == {Ending.OK}
    assert result.cache is not None
    grad = torch.ones(1, 4, 5)
    torch.testing.assert_close(method.apply(result.cache, grad), grad / 0.1)


def test_settings_have_the_kind_of_a_file() -> None:
    assert NGDConfig.model_validate({"preconditioner": {"kind": "tkfac"}}).preconditioner == TKFAC()
