"""Training loops that are not one forward, one backward, one step: what they add to `grad` is what counts.

docs/guides/pitfalls.md lists the ways in which torch's users call an optimizer, with the test of each.
"""

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import KFAC, FixedInterval, MonteCarlo
from ngd_dist.errors import CaptureError
from tests.support.methods import METHODS
from tests.support.tensors import F64, batch, captured, flat


def mlp() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4)).double()


def assert_same(found: Tensor, expected: Tensor, *, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# --- passes that are not the step's own -------------------------------------------------------------------------------


def fgsm(model: nn.Module, x: Tensor, y: Tensor) -> None:
    attacked = x.clone().requires_grad_()
    torch.autograd.grad(F.cross_entropy(model(attacked), y), attacked)


def saliency(model: nn.Module, x: Tensor, y: Tensor) -> None:
    seen = x.clone().requires_grad_()
    model(seen).amax(1).sum().backward(inputs=[seen])


def gradient_norms(model: nn.Module, x: Tensor, y: Tensor) -> None:
    torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))


def frozen_discriminator(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model.requires_grad_(False)
    generated = x.clone().requires_grad_()
    model(generated).sum().backward()
    model.requires_grad_(True)


def forward_alone(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model(x[:7])


def hessian_vector(model: nn.Module, x: Tensor, y: Tensor) -> None:
    weights = list(model.parameters())
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), weights, create_graph=True)
    torch.autograd.grad(sum((g * g.detach()).sum() for g in grads), weights)


PROBES = [fgsm, saliency, gradient_norms, frozen_discriminator, forward_alone, hessian_vector]


@pytest.mark.parametrize("fisher", ["empirical", "monte_carlo"])
@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.__name__)
def test_a_pass_that_leaves_grad_alone_counts_for_nothing(probe: Callable[..., None], fisher: Any) -> None:
    x, y = batch()
    weights = []
    for probes in (True, False):
        model = mlp()
        optimizer = NGD(model, NGDConfig.model_validate({"lr": 0.1, "fisher": {"kind": fisher}}))
        for _ in range(4):
            optimizer.zero_grad()
            if probes:
                probe(model, x, y)
            output = model(x)
            optimizer.fisher_backward(output)
            if probes:
                probe(model, x, y)
            F.cross_entropy(output, y).backward()
            if probes:
                probe(model, x, y)
            optimizer.step()
        weights.append(flat(model))

    assert_same(*weights)


CLEARS: dict[str, Callable[[NGD, nn.Module], None]] = {
    "optimizer": lambda optimizer, _: optimizer.zero_grad(),
    "optimizer, to zeros": lambda optimizer, _: optimizer.zero_grad(set_to_none=False),
    "model": lambda _, model: model.zero_grad(),
    "model, to zeros": lambda _, model: model.zero_grad(set_to_none=False),
}


@pytest.mark.parametrize("fisher", ["empirical", "monte_carlo"])
@pytest.mark.parametrize("clears", CLEARS)
def test_a_pass_whose_gradients_are_cleared_is_forgotten(clears: str, fisher: Any) -> None:
    if fisher == "monte_carlo" and clears.startswith("model"):
        pytest.skip("fisher_backward belongs to a forward pass, not to grad: the optimizer has to be told")
    x, y = batch()
    weights = []
    for perturbs in (True, False):
        model = mlp()
        config = {"lr": 0.1, "staleness": FixedInterval(steps=2), "fisher": {"kind": fisher}}
        optimizer = NGD(model, NGDConfig.model_validate(config))
        for _ in range(4):
            if perturbs:  # as the first pass of SAM, or a generator's step through its discriminator
                output = model(x.flip(0))
                optimizer.fisher_backward(output)
                (3 * F.cross_entropy(output, y)).backward()
            CLEARS[clears](optimizer, model)
            output = model(x)
            optimizer.fisher_backward(output)
            F.cross_entropy(output, y).backward()
            optimizer.step()
            model.zero_grad()
        weights.append(flat(model))

    assert_same(*weights)


def test_a_batch_that_is_given_up_after_its_fisher_pass_is_forgotten() -> None:
    x, y = batch()
    weights = []
    for gives_up in (True, False):
        model = mlp()
        optimizer = NGD(model, NGDConfig(lr=0.1, fisher=MonteCarlo()))
        for _ in range(3):
            optimizer.zero_grad()
            if gives_up:
                optimizer.fisher_backward(model(5 * x))  # its loss is NaN, say: on to the next batch
                optimizer.zero_grad()
            output = model(x)
            optimizer.fisher_backward(output)
            F.cross_entropy(output, y).backward()
            optimizer.step()
        weights.append(flat(model))

    assert_same(*weights)


def test_clearing_between_forward_and_backward_forgets_no_forward_pass() -> None:
    x, y = batch()
    weights = []
    for clears_late in (True, False):
        model = mlp()
        optimizer = NGD(model, NGDConfig(lr=0.1, fisher=MonteCarlo()))
        for _ in range(3):
            if not clears_late:
                optimizer.zero_grad()
            output = model(x)
            optimizer.fisher_backward(output)
            loss = F.cross_entropy(output, y)
            if clears_late:
                optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        weights.append(flat(model))

    assert_same(*weights)


def test_what_runs_while_paused_counts_for_nothing() -> None:
    x, y = batch()
    weights = []
    for probes in (True, False):
        model = mlp()
        optimizer = NGD(model, NGDConfig(lr=0.1))
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if probes:
                kept = [p.grad.clone() for p in model.parameters() if p.grad is not None]
                with optimizer.paused():
                    model(x[:5]).sum().backward()
                for p, gradient in zip(model.parameters(), kept, strict=True):
                    p.grad = gradient
            optimizer.step()
        weights.append(flat(model))

    assert_same(*weights)


def test_a_gan_trains_both_its_networks() -> None:
    torch.manual_seed(0)
    generator, discriminator = nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    twin = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    twin.load_state_dict(discriminator.state_dict())
    real = torch.randn(32, 8)
    g_optimizer = NGD(generator, NGDConfig(lr=0.01))
    d_optimizer, twin_optimizer = NGD(discriminator, NGDConfig(lr=0.01)), NGD(twin, NGDConfig(lr=0.01))

    for _ in range(6):
        z = torch.randn(32, 4)
        g_optimizer.zero_grad()
        F.softplus(-discriminator(generator(z))).mean().backward()  # adds to the discriminator's grad too
        g_optimizer.step()
        fake = generator(z).detach()
        d_optimizer.zero_grad()
        F.softplus(-discriminator(real)).mean().backward()
        F.softplus(discriminator(fake)).mean().backward()
        d_optimizer.step()
        twin_optimizer.zero_grad()
        (F.softplus(-twin(real)).mean() + F.softplus(twin(fake)).mean()).backward()
        twin_optimizer.step()

    assert_same(flat(discriminator), flat(twin), tolerance=1e-5)


def test_gradients_that_autograd_returned_and_the_loop_set_are_the_steps_own() -> None:
    x, y = batch()
    weights = []
    for by_hand in (True, False):
        model = mlp()
        optimizer = NGD(model, NGDConfig(lr=0.1))
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if by_hand:
                for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
                    p.grad = g
            else:
                loss.backward()
            optimizer.step()
        weights.append(flat(model))

    assert_same(*weights)


@pytest.mark.parametrize("first", ["probe", "create_graph"])
def test_of_passes_that_returned_their_gradients_those_that_were_set_count(first: str) -> None:
    x, y = batch()
    weights = []
    for has_first in (True, False):
        model = mlp()
        parameters = list(model.parameters())
        optimizer = NGD(model, NGDConfig(lr=0.1))
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if has_first and first == "probe":
                torch.autograd.grad(3 * F.cross_entropy(model(x.flip(0)), y), parameters)
            elif has_first:
                torch.autograd.grad(loss, parameters, create_graph=True)
            for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p.grad = g
            optimizer.step()
        weights.append(flat(model))

    assert_same(*weights)


def test_probes_hold_nothing_until_the_step() -> None:
    x, y = batch(8)
    model = mlp()
    optimizer = NGD(model)
    parameters = list(model.parameters())

    def held() -> int:
        return sum(
            len(arrived) for passes in optimizer._capture._passes.values() for arrived in passes._returned.values()
        )

    for _ in range(20):
        torch.autograd.grad(F.cross_entropy(model(x), y), parameters)

    assert held() == len(optimizer.layers)


def test_nothing_keeps_an_optimizer_alive() -> None:
    model = mlp()
    optimizer = NGD(model, NGDConfig(fisher=MonteCarlo()))
    model(batch()[0])  # a forward pass that is never differentiated
    gone = weakref.ref(optimizer), weakref.ref(model)

    del optimizer, model
    gc.collect()

    assert [reference() for reference in gone] == [None, None]


def test_a_loss_with_derivatives_in_it_is_one_pass() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    optimizer = NGD(model, NGDConfig(lr=0.01))
    points = torch.randn(32, 2, dtype=F64)

    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        x = points.clone().requires_grad_()
        u = model(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        ddu = sum(torch.autograd.grad(du[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2))
        loss = (ddu - points.prod(1)).square().mean() + 10 * u.square().mean()
        loss.backward()
        assert optimizer.stats.step == len(losses)
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < losses[0]
    assert all(optimizer._curvature.caches.has(layer.name) for layer in optimizer.layers)


# --- several passes of one step ---------------------------------------------------------------------------------------


def two_heads(model: nn.Module, x: Tensor, y: Tensor, *, again: bool) -> Iterator[Tensor]:
    """Yields two losses, of one forward pass or of one each."""
    output = model(x)
    yield F.cross_entropy(output, y)
    yield F.mse_loss(model(x.flip(1)) if again else output, F.one_hot(y, 4).to(F64))


@pytest.mark.parametrize("again", [False, True], ids=["one forward pass", "two forward passes"])
@pytest.mark.parametrize("method", METHODS)
def test_several_backward_calls_give_what_their_sum_gives(method: str, again: bool) -> None:
    x, y = batch()
    weights = []
    for apart in (True, False):
        model = mlp()
        optimizer = NGD(model, NGDConfig(lr=0.1, preconditioner=METHODS[method]))
        for _ in range(3):
            optimizer.zero_grad()
            if apart:
                losses = two_heads(model, x, y, again=again)
                next(losses).backward(retain_graph=True)
                next(losses).backward()
            else:
                sum(two_heads(model, x, y, again=again)).backward()
            optimizer.step()
        weights.append(flat(model))

    assert_same(*weights, tolerance=1e-9)


def test_passes_that_add_up_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    x, y = batch()
    model = mlp()
    optimizer = NGD(model)

    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            for _ in range(2):
                F.cross_entropy(model(x), y).backward()
            optimizer.step()

    (message,) = [record.getMessage() for record in caplog.records]
    assert "'3' had 2 backward passes" in message or "'0' had 2 backward passes" in message
    assert "set micro_batches" in message


def test_an_unforeseen_pass_leaves_the_old_inverses_in_use() -> None:
    """After a step of one pass rows do not wait for the step: a second pass can't be added to what is gone."""
    x, y = batch()
    model = mlp()
    optimizer = NGD(model, NGDConfig(staleness=FixedInterval()))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    before = {name: dict(cache) for name, cache in optimizer._curvature.caches.items() if cache is not None}

    for _ in range(2):
        F.cross_entropy(model(x), y).backward()
    optimizer.step()

    after = {name: dict(cache) for name, cache in optimizer._curvature.caches.items() if cache is not None}
    assert all(torch.equal(value, after[name][entry]) for name in before for entry, value in before[name].items())
    optimizer.zero_grad()
    for _ in range(2):  # and from now on it waits for the second one
        F.cross_entropy(model(x), y).backward()
    assert {key.layer for key in optimizer._capture.take()} == before.keys()


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_one_module_in_two_reentrant_blocks_is_one_pass(micro_batches: int) -> None:
    x, y = batch()
    found = []
    for reentrant in (True, False):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).double()
        torch.manual_seed(2)
        for p in model.parameters():
            nn.init.normal_(p)
        optimizer = NGD(model, NGDConfig(micro_batches=micro_batches))
        for _ in range(2):
            inputs = x.clone().requires_grad_()
            hidden = checkpoint(model[0], inputs, use_reentrant=reentrant)
            hidden = checkpoint(model[0], hidden, use_reentrant=reentrant)
            (F.cross_entropy(model[1](hidden), y) / micro_batches).backward()
        found.append(captured(optimizer))

    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert_same(value, found[1][name])


@pytest.mark.parametrize("method", ["kfac", "lngd"])
def test_an_unforeseen_pass_takes_part_in_the_length_of_the_step(method: str) -> None:
    x, y = batch()
    weights = []
    for apart in (True, False):
        model = mlp()
        config = {
            "lr": 0.01,
            "momentum": 0.0,
            "step_length": {"kind": "layer_wise"},
            "staleness": FixedInterval(steps=50),
        }
        optimizer = NGD(model, NGDConfig.model_validate(config | {"preconditioner": METHODS[method]}))
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        first, second = F.cross_entropy(model(x), y), F.cross_entropy(model(x.flip(1)), y)
        if apart:
            first.backward()
            second.backward()
        else:
            (first + second).backward()
        optimizer.step()
        weights.append(flat(model))

    assert_same(*weights, tolerance=1e-9)


def test_a_model_that_is_checkpointed_as_a_whole_has_the_samples_of_its_batch() -> None:
    model = mlp()
    optimizer = NGD(model)
    for samples in (64, 40):
        x, y = batch(samples)
        optimizer.zero_grad()
        F.cross_entropy(checkpoint(model, x.requires_grad_(), use_reentrant=True), y).backward()
        optimizer.step()

    assert optimizer.stats.step == 2


# --- gradient accumulation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("passes", [1, 2, 3])
def test_a_short_window_measures_what_its_samples_give(passes: int, method: str) -> None:
    x, y = batch(8 * passes)
    config = NGDConfig(preconditioner=METHODS[method], staleness=FixedInterval())
    whole_model, model = mlp(), mlp()
    whole = NGD(whole_model, config)
    F.cross_entropy(whole_model(x), y).backward()
    optimizer = NGD(model, config.model_copy(update={"micro_batches": 4}))

    for part, labels in zip(x.split(8), y.split(8), strict=True):
        (F.cross_entropy(model(part), labels) / 4).backward()

    found, expected = captured(optimizer), captured(whole)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_same(found[name], value, tolerance=1e-10)


def test_windows_of_every_length_train() -> None:
    x, y = batch(32)
    model = mlp()
    optimizer = NGD(model, NGDConfig(lr=0.05, micro_batches=4))

    for passes in (4, 4, 1, 4, 2):
        for part in range(passes):
            (F.cross_entropy(model(x[8 * part : 8 * part + 8]), y[8 * part : 8 * part + 8]) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()

    assert optimizer.stats.step == 5


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_divided_by_what_the_step_has_needs_no_number(method: str) -> None:
    weights = []
    for micro_batches in ("any", None):
        model = mlp()
        config = NGDConfig(lr=0.1, preconditioner=METHODS[method], staleness=FixedInterval(), stagger=0.0)
        optimizer = NGD(model, config.model_copy(update={"micro_batches": micro_batches or 1}))
        for passes in (3, 2, 3, 1):
            x, y = batch(8 * passes)
            optimizer.zero_grad()
            for part, labels in zip(x.split(8), y.split(8), strict=True) if micro_batches else [(x, y)]:
                (F.cross_entropy(model(part), labels) / (passes if micro_batches else 1)).backward()
            optimizer.step()
        weights.append(flat(model))

    assert_same(*weights, tolerance=1e-9)


def test_rows_need_the_number_of_micro_batches() -> None:
    with pytest.raises(ValueError, match="set micro_batches to their number"):
        NGDConfig(preconditioner=KFAC(rows=32), micro_batches="any")


def test_too_many_micro_batches_are_told_of_with_what_to_do() -> None:
    x, y = batch(8)
    model = mlp()
    optimizer = NGD(model, NGDConfig(micro_batches=2))
    for _ in range(3):
        F.cross_entropy(model(x), y).backward()

    with pytest.raises(CaptureError, match=r"3 times in one optimizer step.*micro_batches is 2.*'any'.*paused"):
        optimizer.step()

    optimizer.zero_grad()
    for _ in range(2):
        (F.cross_entropy(model(x), y) / 2).backward()
    optimizer.step()
    assert optimizer.stats.step == 1


def test_two_fisher_passes_of_one_micro_batch_are_told_of_with_what_to_do() -> None:
    x, y = batch(8)
    model = mlp()
    optimizer = NGD(model, NGDConfig(fisher=MonteCarlo()))
    outputs = []
    for part in (x, x.flip(0)):
        outputs.append(model(part))
        optimizer.fisher_backward(outputs[-1])
    sum(F.cross_entropy(output, y) for output in outputs).backward()

    with pytest.raises(CaptureError, match=r"fisher_backward was called 2 times.*tuple of the outputs"):
        optimizer.step()

    optimizer.zero_grad()
    outputs = [model(x), model(x.flip(0))]
    optimizer.fisher_backward(tuple(outputs))
    sum(F.cross_entropy(output, y) for output in outputs).backward()
    optimizer.step()
    assert optimizer.stats.step == 1
