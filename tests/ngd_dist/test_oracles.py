"""K-FAC and the unit-wise blocks equal the exact Fisher where they are exact, in float64."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import KFAC, FixedInterval
from ngd_dist.factors.cost import LayerShape
from ngd_dist.factors.kronecker import pi_split
from ngd_dist.factors.triangle import pack, packed_size, unpack
from ngd_dist.preconditioners.unit_wise import UnitWise
from tests.reference.fisher import block, damped_kfac_step, gauss_newton_blocks, sample_gradients
from tests.support.refreshing import refresh
from tests.support.tensors import F64, captured


def joined(gradients: list[Tensor]) -> Tensor:
    """Returns [N, O, I] from per-sample weight and bias gradients."""
    return torch.cat([g.reshape(g.shape[0], g.shape[1], -1) for g in gradients], dim=2)


def spd(n: int, seed: int) -> Tensor:
    rows = torch.randn(2 * n, n, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return rows.T @ rows / (2 * n)


def test_kronecker_product_is_the_empirical_fisher_of_one_sample() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(1, 5, dtype=F64), torch.tensor([1])
    optimizer = NGD(model)

    F.cross_entropy(model(x), y).backward()

    statistics = captured(optimizer)
    exact = sample_gradients(model, F.cross_entropy, x, y)
    for layer, (w, b) in {"0": (0, 1), "2": (2, 3)}.items():
        fisher = block(joined([exact[w], exact[b].unsqueeze(-1)]))
        torch.testing.assert_close(
            torch.kron(statistics[f"{layer}.G"][0], statistics[f"{layer}.A"][0]), fisher, rtol=0, atol=1e-14
        )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("micro_batches", [1, 5])
def test_g_is_in_units_of_one_samples_own_gradient(reduction: str, micro_batches: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(5, 3, dtype=F64), torch.randn(5, 2, dtype=F64)
    optimizer = NGD(model, NGDConfig(loss_reduction=reduction, micro_batches=micro_batches))

    scale = micro_batches if reduction == "mean" else 1
    for part, target in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
        losses = ((model(part) - target) ** 2).sum(1)
        (getattr(losses, reduction)() / scale).backward()

    g = 2 * (model(x) - y).detach()
    torch.testing.assert_close(captured(optimizer)[".G"][0], g.T @ g / 5, rtol=1e-13, atol=0)


def test_g_without_the_batch_size_would_be_its_inverse_square() -> None:
    model = nn.Linear(3, 2).double()
    x = torch.randn(5, 3, dtype=F64)
    optimizer = NGD(model)
    seen: list[Tensor] = []

    out = model(x)
    out.register_hook(seen.append)
    (out**2).sum(1).mean().backward()

    unscaled = seen[0].T @ seen[0] / 5
    torch.testing.assert_close(unscaled / captured(optimizer)[".G"][0], torch.full((2, 2), 0.04, dtype=F64))


def type_2(model: nn.Module, x: Tensor, sharing: str) -> dict[str, Tensor]:
    """Returns A (x) G summed over the output's coordinates: K-FAC with the exact output curvature I of 1/2 ||.||^2."""
    coordinates = model(x)[0].numel()
    config = NGDConfig(preconditioner=KFAC(sharing=sharing), loss_reduction="sum", micro_batches=coordinates)
    optimizer = NGD(model, config)
    for c in range(coordinates):
        model(x).flatten(1)[:, c].sum().backward()
    statistics = captured(optimizer)
    return {
        layer.name: coordinates * torch.kron(statistics[f"{layer.name}.G"][0], statistics[f"{layer.name}.A"][0])
        for layer in optimizer.layers
    }


def deep_linear(widths: list[int]) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*[nn.Linear(i, o, bias=False) for i, o in pairwise(widths)]).double()


@pytest.mark.parametrize("samples", [1, 6])
def test_kfac_is_the_gauss_newton_block_of_a_deep_linear_net(samples: int) -> None:
    model = deep_linear([4, 5, 3])
    x = torch.randn(samples, 4, dtype=F64)

    approximation = type_2(model, x, "expand")

    for product, exact in zip(approximation.values(), gauss_newton_blocks(model, x), strict=True):
        torch.testing.assert_close(product, exact, rtol=1e-10, atol=1e-12)


class PerPosition(nn.Module):
    """A deep linear net at every position; the outputs are kept apart, or pooled."""

    def __init__(self, pools: bool) -> None:
        super().__init__()
        self.net = deep_linear([4, 5, 3])
        self.pools = pools

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y.mean(1) if self.pools else y


@pytest.mark.parametrize(("pools", "sharing"), [(False, "expand"), (True, "reduce")])
def test_kfac_with_shared_weights_is_the_gauss_newton_block_in_its_setting(pools: bool, sharing: str) -> None:
    model = PerPosition(pools)
    x = torch.randn(6, 3, 4, dtype=F64)

    approximation = type_2(model, x, sharing)

    # With the positions apart, a sample's outputs are P O coordinates, each reached through one position only, while
    # G averages over all P: the sum over coordinates therefore counts each position once, as the exact block does.
    for product, exact in zip(approximation.values(), gauss_newton_blocks(model, x), strict=True):
        torch.testing.assert_close(product, exact, rtol=1e-10, atol=1e-12)


def test_the_setting_matters() -> None:
    model = PerPosition(pools=True)
    x = torch.randn(6, 3, 4, dtype=F64)

    product = next(iter(type_2(model, x, "expand").values()))

    assert not torch.allclose(product, gauss_newton_blocks(model, x)[0], rtol=1e-2)


def test_unit_wise_closed_form_solves_the_damped_2x2_system() -> None:
    torch.manual_seed(0)
    rows = torch.randn(7, 20, 2, dtype=F64)
    blocks = torch.einsum("cni,cnj->cij", rows, rows) / 20
    statistic = torch.stack([blocks[:, 0, 0], blocks[:, 0, 1], blocks[:, 1, 1]], dim=1)
    grad = torch.randn(7, 2, dtype=F64)
    method = UnitWise(LayerShape("bn", "unit_wise", 2, 7))

    cache = refresh(method, {"F": statistic}, frozenset("F"), 1e-3, None).cache

    assert cache is not None
    exact = torch.linalg.solve(blocks + 1e-3 * torch.eye(2, dtype=F64), grad)
    torch.testing.assert_close(method.apply(cache, grad.unsqueeze(0))[0], exact, rtol=1e-14, atol=1e-13)


def test_unit_wise_statistics_are_the_per_sample_second_moments() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)).double().eval()
    nn.init.normal_(model[0].running_mean)
    x, y = torch.randn(6, 3, 2, 2, dtype=F64), torch.randint(2, (6,))
    optimizer = NGD(model)

    F.cross_entropy(model(x), y).backward()

    statistic = captured(optimizer)["0.F"]
    scale, shift, *_ = sample_gradients(model, F.cross_entropy, x, y)
    exact = torch.stack([scale**2, scale * shift, shift**2], dim=-1).mean(0)
    torch.testing.assert_close(statistic, exact, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("damping", [1e-8, 1e-3, 10.0])
def test_pi_split_is_the_trace_normalised_form(damping: float) -> None:
    A, G = spd(6, 0) * 50, spd(4, 1) * 1e-3
    mean_a, mean_g = A.trace() / 6, G.trace() / 4

    damping_a, damping_g = pi_split(mean_a.view(1), mean_g.view(1), damping)

    eye_a, eye_g = torch.eye(6, dtype=F64), torch.eye(4, dtype=F64)
    share = (damping / (mean_a * mean_g)).sqrt()
    normalised = mean_a * mean_g * torch.kron(G / mean_g + share * eye_g, A / mean_a + share * eye_a)
    ours = torch.kron(G + damping_g * eye_g, A + damping_a * eye_a)
    torch.testing.assert_close(ours, normalised, rtol=1e-13, atol=1e-13)


def test_pi_is_one_for_a_dead_layer() -> None:
    damping_a, damping_g = pi_split(torch.ones(1), torch.zeros(1), 4.0)

    assert (float(damping_a), float(damping_g)) == (2.0, 2.0)


def test_one_step_is_the_dense_solve() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)).double()
    x, y = torch.randn(8, 2, 4, 4, dtype=F64), torch.randint(4, (8,))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = NGD(model, NGDConfig(lr=0.3, momentum=0.0, damping=0.01, staleness=FixedInterval()))
    F.cross_entropy(model(x), y).backward()
    statistics = captured(optimizer)
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]

    optimizer.step()

    for layer, (w, b) in {"0": (0, 1), "3": (2, 3)}.items():
        grad_OI = torch.cat([gradients[w].flatten(1), gradients[b].unsqueeze(1)], dim=1)
        exact = damped_kfac_step(grad_OI, statistics[f"{layer}.A"][0], statistics[f"{layer}.G"][0], 0.01)
        parameters = list(model.parameters())
        moved = torch.cat(
            [(before[w] - parameters[w]).flatten(1), (before[b] - parameters[b]).unsqueeze(1)], dim=1
        ).detach()
        torch.testing.assert_close(moved / 0.3, exact, rtol=1e-10, atol=1e-10)


@given(n=st.integers(1, 40), seed=st.integers(0, 2**16))
def test_packed_triangle_round_trip(n: int, seed: int) -> None:
    matrix = spd(n, seed)
    matrix = (matrix + matrix.T) / 2

    packed = pack(matrix)

    assert packed.numel() == packed_size(n) == n * (n + 1) // 2
    assert torch.equal(unpack(packed, n), matrix)


def test_packed_order_is_row_major() -> None:
    matrix = torch.tensor([[0.0, 1, 2], [1, 3, 4], [2, 4, 5]])

    assert pack(matrix).tolist() == [0, 1, 2, 3, 4, 5]


def test_duplicating_the_batch_changes_no_statistic() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 3)).double()
    x, y = torch.randn(4, 1, 3, 3, dtype=F64), torch.randint(3, (4,))
    found = []
    for copies in (1, 3):
        optimizer = NGD(model)
        F.cross_entropy(model(x.repeat(copies, 1, 1, 1)), y.repeat(copies)).backward()
        found.append(captured(optimizer))

    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-13, atol=1e-15)


def test_reduced_inputs_may_be_means_or_sums_as_long_as_gradients_are_the_other() -> None:
    torch.manual_seed(0)
    x, target = torch.randn(6, 5, 4, dtype=F64), torch.randn(6, 5, 3, dtype=F64)
    model = nn.Linear(4, 3, bias=False).double()
    optimizer = NGD(model, NGDConfig(preconditioner=KFAC(sharing="reduce")))

    (model(x) * target).sum((1, 2)).mean().backward()

    found = captured(optimizer)
    summed, mean = x.sum(1), target.mean(1)  # the gradient of each output is its target
    other = torch.kron(mean.T @ mean / 6, summed.T @ summed / 6)
    torch.testing.assert_close(torch.kron(found[".G"][0], found[".A"][0]), other, rtol=1e-13, atol=1e-14)
