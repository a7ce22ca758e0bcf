"""LNGD equals its dense formulas in float64, and reads the forward pass alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import LNGD, GivenLength
from ngd_dist.factors.cost import LayerShape
from ngd_dist.inversion import Ending
from ngd_dist.preconditioners import preconditioner_for
from ngd_dist.statistics.statistic import Key
from tests.reference.lngd import direction, factors, layer_fisher, sampled_squares
from tests.support.refreshing import refresh
from tests.support.slopes import CONFIG, phi_and_psi, two_layers, weighed, with_ones
from tests.support.tensors import F64


def tanh_rows(model: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a_NPI of the first layer and the slopes of the Tanh that follows it."""
    s = model[0](x).detach()
    return with_ones(x).unsqueeze(1), (1 / torch.cosh(s) ** 2).unsqueeze(1)


def test_statistics_are_those_of_the_formula() -> None:
    model, x, y = two_layers()
    optimizer = NGD(model, CONFIG)

    F.cross_entropy(model(x), y).backward()

    Phi, Psi = phi_and_psi(optimizer, "0")
    exact_phi, exact_psi = factors(*tanh_rows(model, x))
    torch.testing.assert_close(Phi[0], exact_phi, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(Psi[0] / Psi.sum(), exact_psi, rtol=1e-12, atol=1e-14)


def test_the_trace_of_the_layers_fisher_is_kept() -> None:
    model, x, y = two_layers()
    optimizer = NGD(model, CONFIG)

    F.cross_entropy(model(x), y).backward()

    Phi, Psi = phi_and_psi(optimizer, "0")
    trace = layer_fisher(*tanh_rows(model, x)).trace()
    torch.testing.assert_close(torch.kron(torch.diag(Psi[0] / Psi.sum()), Phi[0]).trace(), trace, rtol=1e-12, atol=0)
    torch.testing.assert_close(Psi.sum(), trace, rtol=1e-12, atol=0)


def test_the_block_is_the_layers_fisher_of_one_sample() -> None:
    model, x, y = two_layers()
    optimizer = NGD(model, CONFIG)

    F.cross_entropy(model(x[:1]), y[:1]).backward()

    Phi, Psi = phi_and_psi(optimizer, "0")
    exact = layer_fisher(*tanh_rows(model, x[:1]))
    torch.testing.assert_close(torch.kron(torch.diag(Psi[0] / Psi.sum()), Phi[0]), exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU(), nn.GELU()], ids=lambda module: type(module).__name__)
def test_squared_slopes_are_what_sampling_estimates(activation: nn.Module) -> None:
    model, x, y = two_layers(activation)
    optimizer = NGD(model, CONFIG)
    F.cross_entropy(model(x), y).backward()
    samples = 20_000

    sampled = sampled_squares(activation, model[0](x), samples, seed=1)

    _, Psi = phi_and_psi(optimizer, "0")
    # A squared normal has the relative deviation sqrt(2). Psi averages independent draws with unequal weights, which
    # never makes it larger; 4 of them cover all 4 entries of a fixed seed.
    torch.testing.assert_close(weighed(x, sampled), Psi[0], rtol=4 * (2 / samples) ** 0.5, atol=0)


def test_statistics_do_not_depend_on_the_loss() -> None:
    model, x, y = two_layers()
    found = []
    for loss in (F.cross_entropy, lambda out, labels: 100 * out[labels == 0].square().sum()):
        optimizer = NGD(model, CONFIG)
        loss(model(x), y).backward()
        found.append(phi_and_psi(optimizer, "0"))

    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("low", "high"), [(1e-5, 1e-2), (1e-9, 1e9), (0.5, 0.6)])
def test_a_step_is_the_dense_solve(low: float, high: float) -> None:
    model, x, y = two_layers()
    method = LNGD(min_damping=low, max_damping=high)
    optimizer = NGD(model, CONFIG.model_copy(update={"preconditioner": method, "step_length": GivenLength()}))
    before = torch.cat([model[0].weight, model[0].bias.unsqueeze(1)], dim=1).detach()
    exact_factors = factors(*tanh_rows(model, x))

    F.cross_entropy(model(x), y).backward()
    grad_OI = torch.cat([model[0].weight.grad, model[0].bias.grad.unsqueeze(1)], dim=1)
    optimizer.step()

    moved = before - torch.cat([model[0].weight, model[0].bias.unsqueeze(1)], dim=1).detach()
    exact = direction(grad_OI, *exact_factors, low, high)
    # Condition numbers: at most tr Phi / 1e-5, some 1e6, times 25 for Psi.
    torch.testing.assert_close(moved / optimizer.config.lr, exact, rtol=1e-9, atol=1e-9)


def test_positions_count_as_independent_draws() -> None:
    model, *_ = two_layers()
    x = torch.randn(3, 6, 5, dtype=F64)
    optimizer = NGD(model, CONFIG)

    model(x).square().sum((1, 2)).mean().backward()

    Phi, Psi = phi_and_psi(optimizer, "0")
    slopes = 1 / torch.cosh(model[0](x).detach()) ** 2
    exact_phi, exact_psi = factors(with_ones(x), slopes)
    torch.testing.assert_close(Phi[0], exact_phi, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(Psi[0] / Psi.sum(), exact_psi, rtol=1e-12, atol=1e-14)


def test_a_convolution_reads_its_patches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(inplace=True)).double()
    x = torch.randn(2, 2, 4, 4, dtype=F64)
    optimizer = NGD(model, CONFIG)

    model(x).square().sum().backward()

    Phi, Psi = phi_and_psi(optimizer, "0")
    patches_NPI = with_ones(F.unfold(x, 3, padding=1).mT)
    slopes_NPO = (model[0](x).flatten(2).mT > 0).to(F64)
    exact_phi, exact_psi = factors(patches_NPI, slopes_NPO)
    torch.testing.assert_close(Phi[0], exact_phi, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(Psi[0] / Psi.sum(), exact_psi, rtol=1e-12, atol=1e-14)


def test_a_layer_without_an_activation_has_the_slope_one() -> None:
    model, x, y = two_layers()
    kfac, lngd = NGD(model), NGD(model, CONFIG)

    F.cross_entropy(model(x), y).backward()

    Phi, Psi = phi_and_psi(lngd, "2")
    A = kfac._capture.take()[Key("2", "A")]
    torch.testing.assert_close(Phi, 3 * A)
    torch.testing.assert_close(Psi, A[0].trace().expand(1, 3))


def test_a_wide_factor_is_its_diagonal() -> None:
    model, x, y = two_layers()
    dense, narrow = NGD(model, CONFIG), NGD(model, CONFIG.model_copy(update={"max_dense": 5}))

    F.cross_entropy(model(x), y).backward()

    whole, _ = phi_and_psi(dense, "0")
    diagonal, _ = phi_and_psi(narrow, "0")
    assert diagonal.shape == (1, 6)
    torch.testing.assert_close(diagonal[0], whole[0].diagonal())
    narrow.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_micro_batches_give_the_statistics_of_the_whole() -> None:
    model, x, y = two_layers()
    parts, whole = NGD(model, CONFIG.model_copy(update={"micro_batches": 2})), NGD(model, CONFIG)

    with whole._capture.paused():
        for half, labels in zip(x.chunk(2), y.chunk(2), strict=True):
            (F.cross_entropy(model(half), labels) / 2).backward()
    found = phi_and_psi(parts, "0")
    F.cross_entropy(model(x), y).backward()

    for ours, theirs in zip(found, phi_and_psi(whole, "0"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)


def test_a_layer_that_no_sample_reaches_takes_a_finite_step() -> None:
    model, x, y = two_layers(nn.ReLU())
    nn.init.constant_(model[0].bias, -1e3)
    optimizer = NGD(model, CONFIG)

    F.cross_entropy(model(x), y).backward()
    optimizer.step()

    assert optimizer.stats.failed_inversions == 0
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_large_factor_without_full_rank_is_inverted_in_float32() -> None:
    method = preconditioner_for(LayerShape("", "kronecker", inputs=300, outputs=2), CONFIG)
    rows = torch.randn(1, 50, 300, generator=torch.Generator().manual_seed(0)) + 1
    statistics = {"Phi": 1e4 * rows.mT @ rows, "Psi": torch.ones(1, 2)}

    refreshed = refresh(method, statistics, frozenset(statistics), 0.1, None)

    assert refreshed.endings == {"Phi": Ending.OK, "Psi": Ending.OK}


def test_a_refresh_inverts_only_what_is_new() -> None:
    method = preconditioner_for(LayerShape("", "kronecker", inputs=3, outputs=2), CONFIG)
    statistics = {"Phi": torch.eye(3).unsqueeze(0), "Psi": torch.ones(1, 2)}
    old = refresh(method, statistics, frozenset(statistics), 0.1, None).cache
    assert old is not None

    new = refresh(method, {name: 2 * value for name, value in statistics.items()}, frozenset({"Phi"}), 0.1, old).cache

    assert new is not None
    assert new["Psi"] is old["Psi"]
    assert not torch.equal(new["Phi"], old["Phi"])


def test_one_line_of_config_trains() -> None:
    model, x, y = two_layers(nn.ReLU())
    # A step is predicted to lower the loss by lr per layer at most, however small it is already.
    optimizer = NGD(model, NGDConfig(preconditioner=LNGD(), lr=0.01, momentum=0.0))
    losses = []

    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))

    assert losses[-1] < 0.7 * losses[0]
