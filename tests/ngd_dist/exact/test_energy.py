"""A step of the energy natural gradient is that of the dense problem, on any ranks and after a restart."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ngd_dist.config import EnergyNGDConfig
from ngd_dist.errors import CheckpointError, ConfigError, NonFiniteError
from ngd_dist.exact import EnergyNGD, Field
from tests.ngd_dist.exact.pinns import POISSON, WEIGHTS, dense_system, grid_points, network
from tests.support.ranks import run_ranks

POINTS = grid_points(7)
DAMPING = 1e-3


def settings(**changes: Any) -> EnergyNGDConfig:
    fixed = {"damping": DAMPING, "damping_factor": 1.0, "part_weights": WEIGHTS}
    return EnergyNGDConfig(**{**fixed, **changes})


def optimizer(model: nn.Module, **changes: Any) -> EnergyNGD:
    return EnergyNGD(model, POISSON, settings(**changes))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def trained(steps: int = 3, **changes: Any) -> Tensor:
    model = network(6)
    stepping = optimizer(model, **changes)
    for _ in range(steps):
        stepping.step(POINTS)
    return flat(model)


@pytest.mark.parametrize("form", ["weights", "kernel"])
def test_step_is_that_of_the_dense_problem(form: str) -> None:
    model = network(6)
    before = flat(model)
    J, r = dense_system(model, POINTS)

    loss = optimizer(model, form=form, lr=0.5, line_search=None).step(POINTS)

    damped = torch.cat([J, DAMPING**0.5 * torch.eye(J.shape[1], dtype=torch.float64)])
    target = torch.cat([-r, torch.zeros(J.shape[1], dtype=torch.float64)])
    direction = torch.linalg.lstsq(damped, target, driver="gelsd").solution
    assert loss == pytest.approx(float(r @ r), rel=1e-12)
    torch.testing.assert_close(flat(model) - before, 0.5 * direction, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_forms_agree(momentum: float) -> None:
    torch.testing.assert_close(
        trained(form="weights", momentum=momentum), trained(form="kernel", momentum=momentum), rtol=0, atol=1e-8
    )


def test_auto_takes_the_smaller_matrix() -> None:
    small = {"interior": POINTS["interior"][:3], "boundary": POINTS["boundary"][:3]}
    for points, form in ((POINTS, "weights"), (small, "kernel")):
        models = [network(6), network(6)]
        for model, chosen in zip(models, ("auto", form), strict=True):
            optimizer(model, form=chosen).step(points)
        assert torch.equal(*map(flat, models))


def test_auto_counts_each_residual_of_a_point() -> None:
    """Three points have fewer residuals than the network has weights only if each has a single one."""
    points, models = {"interior": POINTS["interior"][:3]}, [network(6), network(6)]

    for model, form in zip(models, ("auto", "weights"), strict=True):
        EnergyNGD(model, {"interior": lambda u, x: u(x) + torch.arange(30)}, EnergyNGDConfig(form=form)).step(points)

    assert torch.equal(*map(flat, models))


@pytest.mark.parametrize("form", ["weights", "kernel"])
def test_chunks_change_nothing(form: str) -> None:
    torch.testing.assert_close(trained(form=form, chunk=5), trained(form=form), rtol=0, atol=1e-9)


def test_line_search_lowers_the_loss_at_every_step() -> None:
    model = network(6)
    stepping = optimizer(model)

    losses = [stepping.step(POINTS) for _ in range(5)] + [stepping.loss(POINTS)]

    assert losses == sorted(losses, reverse=True)


def test_damping_follows_the_length_of_the_step() -> None:
    stepping = optimizer(network(6), damping_factor=3.0)
    expected = DAMPING

    for _ in range(20):
        stepping.step(POINTS)
        group = stepping.param_groups[0]
        expected *= 1 / 3 if group["length"] >= 1 / 4 else 3 if group["length"] < 1 / 32 else 1
        assert group["damping"] == pytest.approx(min(expected, 1e-2))
        expected = group["damping"]

    assert expected != DAMPING


def test_no_damping_stays_none() -> None:
    stepping = optimizer(network(6), damping=0.0, damping_factor=10.0)

    stepping.step(POINTS)

    assert stepping.param_groups[0]["damping"] == 0


@pytest.mark.parametrize("form", ["weights", "kernel"])
def test_full_step_solves_a_problem_that_is_linear_in_the_weights(form: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    target = nn.Linear(3, 2).double()
    points = torch.randn(20, 3, dtype=torch.float64)
    residuals = {"data": lambda u, x: u(x) - target(x).detach()}  # two residuals of each point

    EnergyNGD(model, residuals, settings(damping=0.0, part_weights={}, form=form, line_search=None)).step(
        {"data": points}
    )

    torch.testing.assert_close(model.weight, target.weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.bias, target.bias, rtol=0, atol=1e-12)


def test_frozen_weights_stay_and_float32_trains() -> None:
    model = network(6, dtype=torch.float32)
    model[0].bias.requires_grad_(False)
    frozen = model[0].bias.clone()
    stepping = optimizer(model)
    points = {name: some.float() for name, some in POINTS.items()}

    losses = [stepping.step(points) for _ in range(5)]

    assert torch.equal(model[0].bias, frozen)
    assert losses[-1] < 0.9 * losses[0]


def test_resumes_bit_for_bit() -> None:
    model = network(6)
    stepping = optimizer(model, momentum=0.8)
    stepping.step(POINTS)
    saved = io.BytesIO()
    torch.save([model.state_dict(), stepping.state_dict()], saved)
    stepping.step(POINTS)

    again = network(6, seed=1)
    resumed = optimizer(again, momentum=0.8)
    saved.seek(0)
    of_model, of_optimizer = torch.load(saved)
    again.load_state_dict(of_model)
    resumed.load_state_dict(of_optimizer)
    resumed.step(POINTS)

    assert torch.equal(flat(again), flat(model))
    assert resumed.param_groups == [group | {"params": list(again.parameters())} for group in stepping.param_groups]


def test_a_state_of_another_model_is_refused() -> None:
    other = optimizer(network(5), momentum=0.8)
    other.step(POINTS)

    with pytest.raises(CheckpointError, match="other trainable parameters"):
        optimizer(network(6)).load_state_dict(other.state_dict())
    with pytest.raises(CheckpointError, match="no state of EnergyNGD"):
        optimizer(network(6)).load_state_dict({})


def nan_residual(u: Field, x: Tensor) -> Tensor:
    return u(x) * torch.nan


def infinite_slope(u: Field, x: Tensor) -> Tensor:
    return (u(x) - u(x).detach()).sqrt()


@pytest.mark.parametrize("residual", [nan_residual, infinite_slope])
def test_what_is_not_finite_raises_and_changes_nothing(residual: Any) -> None:
    model = network(6)
    before = flat(model)

    with pytest.raises(NonFiniteError, match="no weight was changed"):
        EnergyNGD(model, {"interior": residual}, EnergyNGDConfig()).step({"interior": POINTS["interior"]})

    assert torch.equal(flat(model), before)


BAD_POINTS = {
    "parts": {"interior": POINTS["interior"]},
    r"shape \[N, d\]": {**POINTS, "boundary": POINTS["boundary"][0]},
    "must be the same": {**POINTS, "boundary": POINTS["boundary"].float()},
    "no rank has a point": {**POINTS, "boundary": POINTS["boundary"][:0]},
}


@pytest.mark.parametrize("message", BAD_POINTS)
def test_other_points_are_refused(message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        optimizer(network(6)).step(BAD_POINTS[message])


def test_weights_of_parts_are_positive() -> None:
    with pytest.raises(ValueError, match=r"part_weights must be > 0, got {'boundary': 0.0}"):
        EnergyNGDConfig(part_weights={"boundary": 0.0})


def test_other_models_and_settings_are_refused() -> None:
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1).double())
    with pytest.raises(ConfigError, match=r"float32.*float64"):
        EnergyNGD(mixed, POISSON)
    with pytest.raises(ConfigError, match="no trainable parameter"):
        EnergyNGD(nn.Tanh(), POISSON)
    with pytest.raises(ConfigError, match="no residuals"):
        EnergyNGD(network(6), {})
    with pytest.raises(ConfigError, match=r"part_weights names \['edge'\]"):
        EnergyNGD(network(6), POISSON, EnergyNGDConfig(part_weights={"edge": 1.0}))
    with pytest.raises(ConfigError, match="one group"):
        optimizer(network(6)).add_param_group({"params": [nn.Parameter(torch.ones(1))]})


RANK_CASES: list[dict[str, Any]] = [
    {"form": form, "momentum": momentum, "damping_factor": 2.0}
    for form in ("weights", "kernel")
    for momentum in (0.0, 0.8)
]


def _on_ranks(rank: int, world_size: int) -> list[Any]:
    results: list[Any] = []
    # Uneven shares: rank 0 has the first third of the inner points, and no other rank has any side.
    cut = len(POINTS["interior"]) // 3
    points = {
        "interior": POINTS["interior"][:cut] if rank == 0 else POINTS["interior"][cut:][rank - 1 :: world_size - 1],
        "boundary": POINTS["boundary"][: None if rank == 0 else 0],
    }
    for case in RANK_CASES:
        model = network(6, seed=rank)  # the weights are those of rank 0
        stepping = optimizer(model, **case)
        losses = [stepping.step(points) for _ in range(3)]
        results.append((losses, flat(model)))
    with pytest.raises(ConfigError) as raised:
        stepping.step(points if rank == 0 else {})
    results.append(str(raised.value))
    return results


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_take_the_step_of_all_their_points(world_size: int) -> None:
    of_ranks = run_ranks(world_size, _on_ranks)

    for index, case in enumerate(RANK_CASES):
        model = network(6)
        stepping = optimizer(model, **case)
        losses = [stepping.step(POINTS) for _ in range(3)]
        for of_rank in of_ranks:
            assert of_rank[index][0] == pytest.approx(losses, rel=1e-10)
            torch.testing.assert_close(of_rank[index][1], flat(model), rtol=0, atol=1e-10)
            assert torch.equal(of_rank[index][1], of_ranks[0][index][1])
    assert f"{world_size - 1} other rank(s) refused" in of_ranks[0][-1]
    assert all("got []" in of_rank[-1] for of_rank in of_ranks[1:])
