"""Derivatives in a forward pass: they are autograd's, and K-FAC trains physics-informed networks on them."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import Empirical, Exact, Gaussian, NormClip
from ngd_dist.errors import ConfigError
from ngd_dist.jets import JetLinear, jets
from tests.support.layer_runs import autograd_sample_gradients, layers_of, sample_gradients, watched
from tests.support.tensors import F64, captured

DIM = 2
LINE = torch.linspace(0, 1, 12, dtype=F64)
INNER = torch.cartesian_prod(LINE[1:-1], LINE[1:-1])
SIDES = torch.cat([torch.stack(pair, 1) for e in (0.0, 1.0) for pair in ((LINE, 0 * LINE + e), (0 * LINE + e, LINE))])


def network(*widths: int, outputs: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    sizes = [DIM, *widths, outputs]
    pairs = [(JetLinear(i, o), nn.Tanh()) for i, o in pairwise(sizes)]
    return nn.Sequential(*[module for pair in pairs for module in pair][:-1]).double()


def test_jets_are_the_derivatives_of_autograd() -> None:
    model, x = network(5, 4, outputs=3), torch.rand(6, DIM, dtype=F64)
    weights = dict(model.named_parameters())

    def at(point: Tensor) -> Tensor:
        output: Tensor = functional_call(model, weights, (point.unsqueeze(0),))
        return output.squeeze(0)

    u = jets(model, x)

    torch.testing.assert_close(u.value, model(x))
    torch.testing.assert_close(u.first, vmap(jacrev(at))(x).movedim(-1, 1))
    torch.testing.assert_close(u.second, vmap(jacrev(jacrev(at)))(x).diagonal(dim1=-2, dim2=-1).movedim(-1, 1))


def test_mixed_derivatives_come_from_directions() -> None:
    model, x = network(5, 4), torch.rand(6, DIM, dtype=F64)
    weights = dict(model.named_parameters())

    along = jets(model, x, torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])).second

    hessian = vmap(jacrev(jacrev(lambda point: functional_call(model, weights, (point.unsqueeze(0),)).squeeze())))(x)
    torch.testing.assert_close((along[:, 2] - along[:, 0] - along[:, 1])[:, 0] / 2, hessian[:, 0, 1])


@pytest.mark.parametrize("shape", [(2,), (1, 3), (0, 2)])
def test_directions_of_another_dimension_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"directions must be \[D > 0, 2\]"):
        jets(network(5), torch.rand(6, DIM, dtype=F64), torch.ones(shape))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 4), (3, 4)])
def test_rows_give_back_each_samples_gradient(shape: tuple[int, ...], has_bias: bool) -> None:
    module = JetLinear(4, 2, bias=has_bias).double()
    x = torch.randn(shape, dtype=F64)
    (layer,) = layers_of(module)
    output, rows_of = watched([layer], lambda: module(x), len(x))
    gradient = torch.randn_like(output)

    rows = rows_of["layer"](gradient)

    expected = autograd_sample_gradients(layer, output, gradient)
    torch.testing.assert_close(sample_gradients(layer, rows), expected, rtol=1e-12, atol=1e-12)


def test_a_plain_linear_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"jets go through JetLinear .* got Linear"):
        jets(nn.Sequential(nn.Linear(2, 1)), torch.rand(3, 2))


@pytest.mark.parametrize("is_used", [True, False], ids=["in the loss", "beside it"])
def test_factors_are_of_the_pass_of_the_loss_alone(is_used: bool) -> None:
    """Inputs of the forward pass, and the loss's own gradients of the outputs, by autograd on the whole graph."""
    model, x = network(5), torch.rand(8, DIM, dtype=F64, requires_grad=True)
    optimizer = NGD(model, NGDConfig(fisher=Empirical()))

    hidden = model[0](x)
    u = model[2](model[1](hidden))
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    loss = u.square().mean() + (du.square().sum(1).mean() if is_used else 0)
    g_hidden, g_u = torch.autograd.grad(loss, [hidden, u], retain_graph=True)
    loss.backward()

    a_hidden = torch.cat([x, torch.ones(8, 1)], 1).detach()
    a_u = torch.cat([torch.tanh(hidden), torch.ones(8, 1)], 1).detach()
    expected = {"0.A": a_hidden.T @ a_hidden / 8, "2.A": a_u.T @ a_u / 8}
    expected |= {"0.G": 8 * g_hidden.T @ g_hidden, "2.G": 8 * g_u.T @ g_u}
    found = captured(optimizer, 0)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-12)


def residual(model: nn.Sequential) -> Tensor:
    """Returns r [N, 1] of Poisson's equation on the unit square, whose mean square is that of its parts."""
    x = torch.cat([INNER, SIDES])
    u = jets(model, x)
    inner = u.second[: len(INNER)].sum(1) + 2 * math.pi**2 * wave(INNER)
    sides = 2 * u.value[len(INNER) :]
    return torch.cat([part * (len(x) / len(part)) ** 0.5 for part in (inner, sides)])


def wave(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x).prod(1, keepdim=True)


def error(model: nn.Module) -> float:
    x = torch.rand(2000, DIM, dtype=F64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float((model(x) - wave(x)).norm() / wave(x).norm())


def test_kfac_of_jets_trains_to_a_lower_error_than_adam_in_as_many_steps() -> None:
    steps, model, rivals = 300, network(32, 32), {lr: network(32, 32) for lr in (0.03,)}
    config = NGDConfig(
        lr=1.0,
        momentum=0.9,
        damping=0.01,
        clip=NormClip(max_norm=0.06),
        fisher=Exact(likelihood=Gaussian(variance=0.5)),
    )
    optimizer = NGD(model, config)
    adams = {lr: torch.optim.Adam(rival.parameters(), lr) for lr, rival in rivals.items()}

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1 - step / steps
        optimizer.zero_grad()
        r = residual(model)
        optimizer.fisher_backward(r)
        r.square().mean().backward()
        optimizer.step()
        for lr, adam in adams.items():
            adam.param_groups[0]["lr"] = lr * (1 - step / steps)
            adam.zero_grad()
            residual(rivals[lr]).square().mean().backward()
            adam.step()

    assert error(model) < 0.5 * min(map(error, rivals.values()))
