"""The Fisher of the model's own predictions, sampled or exact, through `NGD.fisher_backward`."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import KFAC, Bernoulli, Categorical, Exact, FixedInterval, Gaussian, LayerWise, MonteCarlo
from ngd_dist.errors import CaptureError, ConfigError
from tests.reference.fisher import gauss_newton_blocks
from tests.support.tensors import F64, captured

EVERY_STEP = FixedInterval()


def mlp(*widths: int, activation: type[nn.Module] | None = nn.Tanh, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    modules: list[nn.Module] = []
    for i, o in pairwise(widths):
        modules += [nn.Linear(i, o, bias=bias)] + ([activation()] if activation else [])
    return nn.Sequential(*modules[:-1] if activation else modules).double()


def exact_blocks(model: nn.Sequential, x: Tensor, output_hessian: Tensor) -> list[Tensor]:
    """Returns (1/N) sum_n J_n^T H_n J_n per layer, J_n by the joined weight and bias; output_hessian [N, O, O]."""
    blocks = []
    for layer in (module for module in model if isinstance(module, nn.Linear)):
        total = torch.zeros((), dtype=F64)
        for n in range(len(x)):
            out = model(x[n : n + 1])[0]
            rows = []
            for value in out:
                grads = torch.autograd.grad(value, list(layer.parameters()), retain_graph=True)
                rows.append(torch.cat([g.reshape(g.shape[0], -1) for g in grads], dim=1).flatten())
            jacobian = torch.stack(rows)
            total = total + jacobian.T @ output_hessian[n] @ jacobian
        blocks.append(total / len(x))
    return blocks


def softmax_hessian(logits: Tensor) -> Tensor:
    p = logits.softmax(-1)
    return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)


def statistics_of(model: nn.Module, x: Tensor, config: NGDConfig, micro_batches: int = 1) -> dict[str, Tensor]:
    """Returns what `fisher_backward` gives; the loss and its labels must not matter."""
    optimizer = NGD(model, config)
    for part in x.chunk(micro_batches):
        output = model(part)
        optimizer.fisher_backward(output)
        (output.square().sum() * 1e3).backward()
    return captured(optimizer, block=0)


def test_exact_fisher_of_one_sample_is_the_gauss_newton_block() -> None:
    model, x = mlp(4, 5, 3), torch.randn(1, 4, dtype=F64)

    found = statistics_of(model, x, NGDConfig(fisher=Exact()))

    for name, exact in zip(("0", "2"), exact_blocks(model, x, softmax_hessian(model(x))), strict=True):
        product = torch.kron(found[f"{name}.G"], found[f"{name}.A"])
        torch.testing.assert_close(product, exact, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_exact_fisher_of_a_deep_linear_net_is_the_gauss_newton_block(micro_batches: int, reduction: Any) -> None:
    model, x = mlp(4, 5, 3, activation=None, bias=False), torch.randn(6, 4, dtype=F64)
    config = NGDConfig(fisher=Exact(likelihood=Gaussian()), micro_batches=micro_batches, loss_reduction=reduction)

    found = statistics_of(model, x, config, micro_batches)

    for name, exact in zip(("0", "1"), gauss_newton_blocks(model, x), strict=True):
        product = torch.kron(found[f"{name}.G"], found[f"{name}.A"])
        torch.testing.assert_close(product, exact, rtol=1e-10, atol=1e-12)


class PerPosition(nn.Module):
    """A deep linear net at every position; the outputs are kept apart, or pooled."""

    def __init__(self, pools: bool) -> None:
        super().__init__()
        self.net = mlp(4, 5, 3, activation=None, bias=False)
        self.pools = pools

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y.mean(1) if self.pools else y


@pytest.mark.parametrize(("pools", "sharing"), [(False, "expand"), (True, "reduce")])
def test_exact_fisher_with_shared_weights_is_exact_in_its_setting(pools: bool, sharing: Any) -> None:
    model, x = PerPosition(pools), torch.randn(6, 3, 4, dtype=F64)
    config = NGDConfig(preconditioner=KFAC(sharing=sharing), fisher=Exact(likelihood=Gaussian(), positions="sum"))

    found = statistics_of(model, x, config)

    for name, exact in zip(("net.0", "net.1"), gauss_newton_blocks(model, x), strict=True):
        product = torch.kron(found[f"{name}.G"], found[f"{name}.A"])
        torch.testing.assert_close(product, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian(variance=0.3)])
def test_sampled_fisher_tends_to_the_exact_one(likelihood: Any) -> None:
    model, x = mlp(4, 5, 3), torch.randn(8, 4, dtype=F64)

    exact = statistics_of(model, x, NGDConfig(fisher=Exact(likelihood=likelihood)))
    draws = [
        statistics_of(model, x, NGDConfig(fisher=MonteCarlo(likelihood=likelihood, samples=100, seed=seed)))
        for seed in range(20)
    ]

    for name in ("0.G", "2.G"):
        mean = torch.stack([draw[name] for draw in draws]).mean(0)
        # 16,000 draws: a mean of squares is off by sqrt(2 / 16000) = 1 % of its size, twice that twice in three.
        torch.testing.assert_close(mean, exact[name], rtol=0, atol=0.05 * float(exact[name].abs().max()))
    assert all(torch.equal(draw["0.A"], exact["0.A"]) for draw in draws)


def test_what_is_drawn_depends_on_seed_and_step_alone() -> None:
    model, x = mlp(4, 5, 3), torch.randn(8, 4, dtype=F64)

    first, again, other = (statistics_of(model, x, NGDConfig(fisher=MonteCarlo(seed=seed))) for seed in (1, 1, 2))

    assert torch.equal(first["0.G"], again["0.G"])
    assert not torch.equal(first["0.G"], other["0.G"])


def test_no_gradient_of_a_parameter_is_touched() -> None:
    model, x = mlp(4, 5, 3), torch.randn(8, 4, dtype=F64)
    optimizer = NGD(model, NGDConfig(fisher=Exact()))

    output = model(x)
    optimizer.fisher_backward(output)
    assert all(p.grad is None for p in model.parameters())
    output.sum().backward()
    mine = [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model.zero_grad()
    model(x).sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(mine, model.parameters(), strict=True) if p.grad is not None)


def test_activation_checkpointing_changes_nothing() -> None:
    model, x = mlp(4, 5, 3), torch.randn(8, 4, dtype=F64).requires_grad_()
    plain = statistics_of(model, x, NGDConfig(fisher=Exact()))
    optimizer = NGD(model, NGDConfig(fisher=Exact()))

    output = checkpoint(model, x, use_reentrant=False)
    optimizer.fisher_backward(output)
    output.sum().backward()

    for name, value in captured(optimizer, block=0).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-12, atol=0)


def test_a_step_without_due_statistics_needs_no_further_backward_pass() -> None:
    model, x, y = mlp(4, 5, 3), torch.randn(8, 4, dtype=F64), torch.randint(3, (8,))
    optimizer = NGD(model, NGDConfig(fisher=Exact(), staleness=FixedInterval(steps=3), stagger=0.0))
    passes: list[int] = []
    for _ in range(4):
        optimizer.zero_grad()
        output = model(x)
        passes.append(0)
        output.register_hook(lambda g: passes.__setitem__(-1, passes[-1] + 1))
        optimizer.fisher_backward(output)
        F.cross_entropy(output, y).backward()
        optimizer.step()

    assert passes == [3 + 1, 1, 1, 3 + 1]


def test_forgetting_the_call_is_an_error_that_says_how() -> None:
    model, x = mlp(4, 5, 3), torch.randn(8, 4, dtype=F64)
    optimizer = NGD(model, NGDConfig(fisher=MonteCarlo()))
    model(x).sum().backward()

    with pytest.raises(CaptureError, match=r"'monte_carlo' needs .* call optimizer.fisher_backward\(output\)"):
        optimizer.step()


def test_calling_it_twice_for_one_forward_pass_is_an_error() -> None:
    model, x = mlp(4, 5, 3), torch.randn(8, 4, dtype=F64)
    optimizer = NGD(model, NGDConfig(fisher=MonteCarlo()))
    output = model(x)
    optimizer.fisher_backward(output)

    with pytest.raises(CaptureError, match="once after each forward pass"):
        optimizer.fisher_backward(output)


def test_too_many_outputs_for_the_exact_fisher_are_refused_with_their_number() -> None:
    model, x = mlp(4, 5, 3), torch.randn(8, 4, dtype=F64)
    optimizer = NGD(model, NGDConfig(fisher=Exact(max_outputs=2)))

    with pytest.raises(ConfigError, match="3, but max_outputs is 2"):
        optimizer.fisher_backward(model(x))


def test_the_empirical_fisher_ignores_the_call() -> None:
    model, x = mlp(4, 5, 3), torch.randn(8, 4, dtype=F64)
    optimizer = NGD(model, NGDConfig(staleness=EVERY_STEP))
    output = model(x)

    optimizer.fisher_backward(output)
    output.sum().backward()

    assert set(captured(optimizer, block=0)) == {"0.A", "0.G", "2.A", "2.G"}


@pytest.mark.parametrize("is_differentiable", [False, True])
def test_another_forward_pass_in_between_changes_nothing(is_differentiable: bool) -> None:
    model, x = mlp(4, 5, 3), torch.randn(8, 4, dtype=F64)
    plain = statistics_of(model, x, NGDConfig(fisher=Exact()))
    optimizer = NGD(model, NGDConfig(fisher=Exact()))

    output = model(x)
    with torch.set_grad_enabled(is_differentiable):
        model(torch.randn(2, 4, dtype=F64))
    optimizer.fisher_backward(output)
    output.sum().backward()

    assert all(torch.equal(value, plain[name]) for name, value in captured(optimizer, block=0).items())


def test_a_due_layer_that_did_not_run_needs_no_pass() -> None:
    model = nn.ModuleDict({"used": mlp(4, 3), "unused": nn.Linear(4, 3).double()})
    optimizer = NGD(model, NGDConfig(fisher=MonteCarlo(), staleness=FixedInterval(steps=3)))

    for _ in range(4):
        optimizer.zero_grad()
        output = model["used"](torch.randn(8, 4, dtype=F64))
        optimizer.fisher_backward(output)
        F.cross_entropy(output, torch.randint(3, (8,))).backward()
        optimizer.step()

    assert optimizer.stats.step == 4


def test_a_layer_that_the_loss_alone_reads_has_no_fisher_pass_to_miss() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.side = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = torch.tanh(self.body(x))
            return self.head(hidden), self.side(hidden)

    torch.manual_seed(0)
    model, x, y = TwoHeads(), torch.randn(8, 4), torch.randint(3, (8,))
    # Layer-wise rates read the loss's rows of every layer.
    optimizer = NGD(model, NGDConfig(fisher=MonteCarlo(), step_length=LayerWise()))

    output, other = model(x)
    optimizer.fisher_backward(output)
    (F.cross_entropy(output, y) + other.square().mean()).backward()
    optimizer.step()

    assert [name for name in ("body", "head", "side") if optimizer._curvature.caches.has(name)] == ["body", "head"]


def test_forward_passes_that_are_never_differentiated_do_not_pile_up() -> None:
    model, x = mlp(4, 5, 3), torch.randn(8, 4, dtype=F64)
    optimizer = NGD(model, NGDConfig(fisher=MonteCarlo()))

    for _ in range(50):
        model(x)

    assert len(optimizer._capture._edges) <= 3 * len(optimizer.layers)
