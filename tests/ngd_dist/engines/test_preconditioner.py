"""The natural gradient before another optimizer, in one process and on a bare model of two ranks; steps that are
skipped."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig, Preconditioner
from ngd_dist.config import (
    AdamWFallback,
    FixedInterval,
    KLClip,
    LayerWise,
    LevenbergMarquardt,
    PolynomialDamping,
    QuadraticModel,
    SGDFallback,
)
from ngd_dist.errors import CaptureError, ConfigError, NonFiniteError
from tests.support.ranks import run_ranks
from tests.support.tensors import F64

SETTINGS = {"damping": 0.05, "staleness": FixedInterval(steps=2)}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.PReLU(), nn.Linear(6, 3)).to(F64)


def batches(count: int, samples: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(samples, 5, generator=generator, dtype=F64)
        yield x, torch.randint(3, (samples,), generator=generator)


def trained(
    model: nn.Module, optimizer: torch.optim.Optimizer, preconditioner: Preconditioner | None = None
) -> nn.Module:
    for x, y in batches(5):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if preconditioner is None or preconditioner.step():
            optimizer.step()
    return model


def equal(first: nn.Module, second: nn.Module) -> None:
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip": KLClip(max_kl=1e-4)},
        {"damping_rule": PolynomialDamping(end=0.5, steps=10)},
        {"step_length": LayerWise()},
    ],
    ids=["plain", "kl clip", "scheduled damping", "layer_wise"],
)
def test_before_sgd_with_momentum_it_is_ngd(settings: dict[str, object]) -> None:
    ours, theirs = net(), net()
    lr = {"lr": 0.2} if "clip" in settings else {}

    trained(ours, NGD(ours, NGDConfig(lr=0.2, momentum=0.8, fallback=SGDFallback(), **SETTINGS | settings)))
    preconditioner = Preconditioner(theirs, NGDConfig(**lr, **SETTINGS | settings))
    trained(theirs, torch.optim.SGD(theirs.parameters(), lr=0.2, momentum=0.8), preconditioner)

    equal(ours, theirs)


def test_an_adamw_goes_on_from_natural_gradients() -> None:
    model = net()
    preconditioner = Preconditioner(model, NGDConfig(**SETTINGS))
    (x, y), _ = batches(2)
    before = F.cross_entropy(model(x), y).item()

    trained(model, torch.optim.AdamW(model.parameters(), lr=0.05), preconditioner)

    assert F.cross_entropy(model(x), y).item() < before
    assert preconditioner.stats.step == 5


def test_gradients_of_other_parameters_stay_as_they_are() -> None:
    model, (x, y) = net(), next(batches(1))
    preconditioner = Preconditioner(model, NGDConfig(**SETTINGS))
    F.cross_entropy(model(x), y).backward()
    before = [p.grad.clone() for p in model.parameters()]

    assert preconditioner.step()

    changed = [not torch.equal(p.grad, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert changed == [True, True, False, True, True]  # the third is the PReLU's
    assert "not preconditioned:\n  1.weight" in preconditioner.explain()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"momentum": 0.9}, "momentum must be left out"),
        ({"weight_decay": 0.1, "burn_in": 3}, "weight_decay, burn_in must be left out"),
        ({"fallback": AdamWFallback()}, "fallback must be left out"),
        ({"lr": 0.1}, "only clip kl reads it"),
        ({"step_length": QuadraticModel()}, "decides the whole step"),
        ({"damping_rule": LevenbergMarquardt()}, "decides the whole step"),
    ],
)
def test_settings_of_the_update_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Preconditioner(net(), NGDConfig(**settings))


def test_groups_have_a_damping_of_their_own_and_no_momentum() -> None:
    model = net()

    with pytest.raises(ConfigError, match="weight_decay must be left out of a Preconditioner's param_groups"):
        Preconditioner(model, param_groups=[{"params": model.parameters(), "weight_decay": 0.1}])
    groups = [{"params": model[0].parameters(), "damping": 0.5}, {"params": model[2].parameters()}]
    assert [group["damping"] for group in Preconditioner(model, param_groups=groups).param_groups] == [0.5, 0.1]


def test_a_step_that_is_not_finite_leaves_nothing_for_the_optimizer() -> None:
    model, (x, y) = net(), next(batches(1))
    preconditioner = Preconditioner(model, NGDConfig(non_finite="skip", **SETTINGS))
    (F.cross_entropy(model(x), y) * torch.nan).backward()

    assert not preconditioner.step()

    assert all(p.grad is None for p in model.parameters())
    assert (preconditioner.stats.step, preconditioner.stats.skipped_steps) == (0, 1)
    strict = Preconditioner(net(), NGDConfig(**SETTINGS))
    (F.cross_entropy(strict._model(x), y) * torch.nan).backward()
    with pytest.raises(NonFiniteError, match=r"gradient of '0\.weight'"):
        strict.step()


def test_a_scaler_divides_its_factor_out_before() -> None:
    """As in float32 without one: the statistics know the factor too."""
    (x, y), results = next(batches(1)), []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        model = net()
        preconditioner = Preconditioner(model, NGDConfig(**SETTINGS), grad_scaler=scaler)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = F.cross_entropy(model(x), y)
        if scaler is None:
            loss.backward()
        else:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
        assert preconditioner.step()
        optimizer.step() if scaler is None else scaler.step(optimizer)
        results.append(model)

    equal(*results)


def test_its_state_goes_on() -> None:
    model, other = net(), net()
    first, second = Preconditioner(model, NGDConfig(**SETTINGS)), Preconditioner(other, NGDConfig(**SETTINGS))
    trained(model, torch.optim.SGD(model.parameters(), lr=0.1), first)
    other.load_state_dict(model.state_dict())

    second.load_state_dict(first.state_dict())

    trained(model, torch.optim.SGD(model.parameters(), lr=0.1), first)
    trained(other, torch.optim.SGD(other.parameters(), lr=0.1), second)
    equal(model, other)
    assert second.stats.step == 10


def on_bare_ranks(rank: int, world_size: int) -> list[Tensor]:
    model = net()
    preconditioner = Preconditioner(model, NGDConfig(**SETTINGS))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.8)
    for x, y in batches(5):
        part = slice(rank * 8, rank * 8 + 8)
        optimizer.zero_grad()
        F.cross_entropy(model(x[part]), y[part]).backward()
        if preconditioner.step():
            optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.ranks
def test_a_bare_model_on_ranks_gets_the_mean_of_every_gradient() -> None:
    alone = net()
    trained(
        alone, torch.optim.SGD(alone.parameters(), lr=0.2, momentum=0.8), Preconditioner(alone, NGDConfig(**SETTINGS))
    )

    for weights in run_ranks(2, on_bare_ranks):
        for weight, expected in zip(weights, alone.parameters(), strict=True):
            torch.testing.assert_close(weight, expected.detach(), rtol=1e-12, atol=1e-12)


def test_a_skipped_step_is_forgotten() -> None:
    """As if it had not been; without a word of it, its passes would count as the next step's."""
    (skipped, counted), config = list(batches(2)), NGDConfig(micro_batches=2, **SETTINGS)
    results = []
    for has_skipped in (True, False):
        model = net()
        optimizer = NGD(model, config)
        for x, y in [skipped, counted] if has_skipped else [counted]:
            for half in (slice(8), slice(8, 16)):
                (F.cross_entropy(model(x[half]), y[half]) / 2).backward()
            if x is skipped[0]:
                model.zero_grad()
                optimizer.skip()
        optimizer.step()
        results.append(model)
        assert (optimizer.stats.step, optimizer.stats.skipped_steps) == (1, int(has_skipped))

    equal(*results)


def test_skipped_steps_that_are_not_told_of_are_an_error_that_names_the_way_out() -> None:
    model, (x, y) = net(), next(batches(1))
    optimizer = NGD(model, NGDConfig(micro_batches=2, **SETTINGS))
    for _ in range(3):
        (F.cross_entropy(model(x), y) / 2).backward()

    with pytest.raises(CaptureError, match=r"call optimizer\.skip\(\) after each"):
        optimizer.step()
