"""lr, momentum and damping that follow the loss, through `NGD.step(objective=...)`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig, part_of
from ngd_dist.config import (
    Exact,
    ExponentialDamping,
    FixedInterval,
    Gaussian,
    LevenbergMarquardt,
    PolynomialDamping,
    QuadraticModel,
)
from ngd_dist.errors import ConfigError, NonFiniteError
from tests.support.ranks import run_ranks
from tests.support.tensors import F64

Step = Callable[[], float]


def half_squares(output: Tensor, y: Tensor) -> Tensor:
    return ((output - y) ** 2).sum(1).mean() / 2


def regression(config: NGDConfig, samples: slice = slice(None)) -> tuple[nn.Linear, NGD, Step, Tensor, Tensor]:
    """Returns a linear regression, and a function that takes one step and returns the loss before it."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 4, dtype=F64)[samples], torch.randn(32, 2, dtype=F64)[samples]
    model = nn.Linear(4, 2).double()
    optimizer = NGD(model, config)

    def objective() -> tuple[Tensor, Tensor]:
        output = model(x)
        return half_squares(output, y), output

    def step() -> float:
        optimizer.zero_grad()
        loss, output = objective()
        optimizer.fisher_backward(output)
        loss.backward()
        optimizer.step(objective=objective if config.needs_objective else None)
        return loss.item()

    return model, optimizer, step, x, y


# For squared error of a linear net the exact Fisher is A (x) I, and K-FAC's inverse of it the Newton step.
NEWTON = {"fisher": Exact(likelihood=Gaussian()), "staleness": FixedInterval()}


def test_one_step_of_the_quadratic_model_solves_a_linear_regression() -> None:
    config = NGDConfig.model_validate({**NEWTON, "step_length": QuadraticModel(), "damping": 1e-14})
    model, optimizer, step, x, y = regression(config)

    step()

    rows = torch.cat([x, torch.ones(32, 1, dtype=F64)], dim=1)
    best = torch.linalg.lstsq(rows, y).solution.T
    torch.testing.assert_close(
        torch.cat([model.weight, model.bias.unsqueeze(1)], dim=1).detach(), best, rtol=1e-5, atol=1e-6
    )
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1.0, rel=1e-5)


def test_the_chosen_step_minimises_the_damped_model_over_both_directions() -> None:
    config = NGDConfig.model_validate({**NEWTON, "step_length": QuadraticModel(), "damping": 0.3})
    model, optimizer, step, x, y = regression(config)
    weights = [p.detach().clone() for p in model.parameters()]
    step()
    first = [p.detach().clone() for p in model.parameters()]
    last = torch.cat([(new - old).flatten() for new, old in zip(first, weights, strict=True)])
    gradients = torch.autograd.grad(half_squares(model(x), y), list(model.parameters()))
    step()
    taken = torch.cat([(p.detach() - old).flatten() for p, old in zip(model.parameters(), first, strict=True)])

    # M(d) = g d + d (F + damping I) d / 2 must be flat along the last step and along what was added to it.
    blocks = torch.autograd.functional.jacobian(lambda w, b: F.linear(x, w, b), (first[0], first[1]))
    jacobian = torch.cat([block.flatten(0, 1).flatten(1) for block in blocks], dim=1)
    fisher = jacobian.T @ jacobian / len(x) + 0.3 * torch.eye(10, dtype=F64)
    slope = torch.cat([g.flatten() for g in gradients]) + fisher @ taken
    other = taken - optimizer.param_groups[0]["momentum"] * last
    assert abs(float(slope @ last)) < 1e-9 * float(slope.norm() * last.norm())
    assert abs(float(slope @ other)) < 1e-9 * float(slope.norm() * other.norm())


def test_an_objective_of_a_part_gives_the_curvature_and_the_batch_the_slope() -> None:
    rule = LevenbergMarquardt(every=1)
    settings = {"step_length": QuadraticModel(), "damping_rule": rule, "damping": 1e-9}
    model, optimizer, _, x, y = regression(NGDConfig.model_validate({**NEWTON, **settings}))
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    part_x, part_y = part_of((x, y), 1 / 8)

    def objective() -> tuple[Tensor, Tensor]:
        output = model(part_x)
        return half_squares(output, part_y), output

    output = model(x)
    optimizer.fisher_backward(output)
    half_squares(output, y).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    optimizer.step(objective=objective)

    # Along d the model is flat at the step taken: grad d + d F d, the gradient of all samples, F of the part's.
    d = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    change = part_x @ d[:8].view(2, 4).T + d[8:]
    assert float(gradient @ d) == pytest.approx(-float(change.square().sum(1).mean()), rel=1e-6)
    # A linear regression is its own quadratic model, so the part's loss changes as the part's model says.
    assert optimizer.stats.adapted.reduction_ratio == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("length", [{"kind": "given"}, {"kind": "quadratic_model"}])
def test_damping_falls_while_the_model_is_right(length: dict[str, str]) -> None:
    rule = LevenbergMarquardt(every=2)
    settings: dict[str, Any] = {**NEWTON, "step_length": length, "damping_rule": rule, "damping": 1e-3}
    if length["kind"] == "given":
        settings |= {"lr": 0.5, "momentum": 0.0}
    _, optimizer, step, *_ = regression(NGDConfig.model_validate(settings))

    seen = []
    for _ in range(4):
        step()
        seen.append((optimizer.param_groups[0]["damping"], optimizer.stats.adapted.reduction_ratio))

    # A linear regression is its own quadratic model, and rho's model has the damping, too small to matter, besides.
    factor = rule.decay**rule.every
    assert [damping for damping, _ in seen] == pytest.approx([1e-3, 1e-3 * factor, 1e-3 * factor, 1e-3 * factor**2])
    assert [rho is None for _, rho in seen] == [True, False, True, False]
    assert seen[1][1] == pytest.approx(1.0, abs=1e-2)


def test_damping_rises_when_the_loss_does() -> None:
    rule = LevenbergMarquardt(every=1)
    settings = {**NEWTON, "damping_rule": rule, "damping": 1e-3, "lr": 5.0, "momentum": 0.0}
    _, optimizer, step, *_ = regression(NGDConfig.model_validate(settings))

    step()

    assert optimizer.param_groups[0]["damping"] == pytest.approx(1e-3 / rule.decay)


def test_a_changed_damping_reaches_the_directions_before_the_next_refresh() -> None:
    settings = {**NEWTON, "staleness": FixedInterval(steps=1000), "lr": 0.1, "momentum": 0.0, "damping": 1e-3}
    _, optimizer, step, *_ = regression(NGDConfig.model_validate(settings))
    for _ in range(2):
        step()
    optimizer.param_groups[0]["damping"] = 10.0
    step()

    A, G = (optimizer._curvature.statistics[key].value for key in optimizer._schedule.tracks)
    assert A is not None
    assert G is not None
    cache = optimizer._curvature.caches[""]
    assert cache is not None
    pi = ((A[0].trace() / 5) / (G[0].trace() / 2)).sqrt()
    exact = torch.linalg.inv(A[0] + pi * 10**0.5 * torch.eye(5, dtype=F64))
    torch.testing.assert_close(cache["A"][0], exact, rtol=1e-10, atol=1e-12)


def test_scheduled_damping_is_a_function_of_the_step() -> None:
    for rule, expected in (
        (ExponentialDamping(factor=0.5, every=2), [0.8 * 0.5**0.5, 0.4, 0.4 * 0.5**0.5]),
        (PolynomialDamping(end=0.2, steps=3), [0.6, 0.4, 0.2]),
    ):
        settings = {**NEWTON, "damping": 0.8, "damping_rule": rule}
        _, optimizer, step, *_ = regression(NGDConfig.model_validate(settings))
        found = []
        for _ in range(3):
            step()
            found.append(optimizer.stats.damping)
        assert found == pytest.approx(expected)


def test_burn_in_gathers_statistics_and_leaves_the_weights() -> None:
    settings = {**NEWTON, "burn_in": 2, "ema_decay": 0.5}
    model, optimizer, step, *_ = regression(NGDConfig.model_validate(settings))
    before = [p.detach().clone() for p in model.parameters()]

    step()
    step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert [s.weight for s in optimizer._curvature.statistics.values()] == [1.5, 1.5]
    step()
    assert not torch.equal(before[0], model.weight)


def test_an_objective_is_asked_for_and_refused_by_name() -> None:
    model, optimizer, *_, x, y = regression(NGDConfig(step_length=QuadraticModel()))
    half_squares(model(x), y).backward()
    with pytest.raises(ConfigError, match=r"call step\(objective=...\)"):
        optimizer.step()
    plain = NGD(model)
    half_squares(model(x), y).backward()
    with pytest.raises(ConfigError, match="leave out objective"):
        plain.step(objective=lambda: (half_squares(model(x), y), model(x)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step_length": QuadraticModel(), "lr": 0.1}, r"leave out \['lr'\]"),
        ({"step_length": QuadraticModel(), "weight_decay": 0.1}, "leave out weight_decay"),
        ({"batch_dim": 1, "fisher": Exact()}, "leave out batch_dim"),
        ({"preconditioner": {"kind": "lngd", "min_damping": 1.0}}, "min_damping must be <= max_damping, got 1.0"),
        ({"step_length": QuadraticModel(), "clip": {"kind": "kl"}}, "leave out clip kl"),
        ({"step_length": QuadraticModel(), "fallback": {"kind": "adamw"}}, "leave out fallback adamw"),
        ({"step_length": QuadraticModel(), "momentum_mode": "proportional"}, "leave out momentum_mode"),
        ({"preconditioner": {"kind": "lngd"}, "damping_rule": LevenbergMarquardt()}, "leave out damping_rule"),
        ({"preconditioner": {"kind": "lngd"}, "fisher": Exact()}, "leave out fisher exact"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        NGDConfig.model_validate(settings)


def test_settings_that_were_written_out_are_read_again() -> None:
    config = NGDConfig(step_length=QuadraticModel(), damping=0.3)

    assert NGDConfig.model_validate_json(config.model_dump_json()) == config


def adapted_steps(rank: int, world_size: int) -> tuple[list[Tensor], float, float]:
    settings = {
        **NEWTON, "step_length": QuadraticModel(), "damping": 0.1, "damping_rule": LevenbergMarquardt(every=1)
    }  # fmt: skip
    model, optimizer, step, *_ = regression(NGDConfig.model_validate(settings), slice(rank, None, world_size))
    for _ in range(4):
        step()
    return [p.detach() for p in model.parameters()], optimizer.param_groups[0]["lr"], optimizer.stats.damping


def summed_steps(rank: int, world_size: int) -> tuple[list[Tensor], float]:
    torch.manual_seed(0)
    samples = slice(rank, None, world_size)
    x, y = torch.randn(8, 4, dtype=F64)[samples], torch.randn(8, 2, dtype=F64)[samples]
    model = nn.Linear(4, 2).double()
    optimizer = NGD(model, NGDConfig(step_length=QuadraticModel(), loss_reduction="sum", damping=1.0))

    def objective() -> tuple[Tensor, Tensor]:
        output = model(x)
        return F.mse_loss(output, y, reduction="sum"), output

    for _ in range(3):
        optimizer.zero_grad()
        objective()[0].backward()
        optimizer.step(objective=objective)
    return [p.detach() for p in model.parameters()], optimizer.param_groups[0]["lr"]


@pytest.mark.ranks
def test_a_summed_loss_is_modelled_alike_on_any_number_of_ranks() -> None:
    alone, lr = summed_steps(0, 1)

    for weights, its_lr in run_ranks(2, summed_steps):
        assert its_lr == pytest.approx(lr, rel=1e-9)
        for ours, theirs in zip(weights, alone, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("non_finite", ["raise", "skip"])
def test_a_model_of_the_loss_that_is_not_finite_moves_nothing(non_finite: Any) -> None:
    model = nn.Linear(4, 1).double()
    for p in model.parameters():
        nn.init.zeros_(p)
    x, y = torch.randn(6, 4, dtype=F64), torch.arange(6, dtype=F64).unsqueeze(1)
    optimizer = NGD(model, NGDConfig(step_length=QuadraticModel(), non_finite=non_finite))

    def objective() -> tuple[Tensor, Tensor]:
        output = model(x)
        return (output - y).abs().pow(1.5).mean(), output  # no second derivative at the first sample's 0

    objective()[0].backward()
    if non_finite == "raise":
        with pytest.raises(NonFiniteError, match="quadratic model of the loss is NaN or infinite in step 1"):
            optimizer.step(objective=objective)
    else:
        optimizer.step(objective=objective)
    assert not any(bool(p.any()) for p in model.parameters())


@pytest.mark.ranks
def test_ranks_choose_alike_and_as_one_process_would() -> None:
    alone, lr, damping = adapted_steps(0, 1)

    found = run_ranks(2, adapted_steps)

    for weights, its_lr, its_damping in found:
        assert all(torch.equal(a, b) for a, b in zip(weights, found[0][0], strict=True))
        for ours, theirs in zip(weights, alone, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        assert (its_lr, its_damping) == pytest.approx((lr, damping), rel=1e-9)


def test_digits_without_any_tuning() -> None:
    """What the measurements of the field say makes K-FAC win in steps: adaptation."""
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    config = NGDConfig.model_validate(
        {
            "fisher": {"kind": "monte_carlo"},
            "step_length": QuadraticModel(),
            "damping_rule": LevenbergMarquardt(),
            "damping": 0.1,
        }
    )
    optimizer = NGD(model, config)

    def objective() -> tuple[Tensor, Tensor]:
        output = model(x)
        return F.cross_entropy(output, y), output

    for _ in range(30):
        optimizer.zero_grad()
        loss, output = objective()
        optimizer.fisher_backward(output)
        loss.backward()
        optimizer.step(objective=objective)

    assert loss.item() < 0.05


def test_torchs_attention_takes_steps_of_the_quadratic_model() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(encoder, nn.Flatten(), nn.Linear(24, 3)).double()
    x, y = torch.randn(16, 3, 8, dtype=F64), torch.randint(3, (16,))
    optimizer = NGD(model, NGDConfig(step_length=QuadraticModel(), damping_rule=LevenbergMarquardt(every=1)))

    def objective() -> tuple[Tensor, Tensor]:
        output = model(x)
        return F.cross_entropy(output, y), output

    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss, _ = objective()
        loss.backward()
        optimizer.step(objective=objective)
        losses.append(loss.item())

    assert losses == sorted(losses, reverse=True)
    assert optimizer.stats.step == 4
