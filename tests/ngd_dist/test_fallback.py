"""The fallback optimizer is torch.optim.AdamW, led by NGD's param groups."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ngd_dist.config import AdamWFallback
from ngd_dist.errors import CheckpointError
from ngd_dist.step.fallback import Fallback
from tests.support.tensors import F64

CONFIG = AdamWFallback(lr=0.01, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1)
NAMES = ["scale", "shift", "position.table"]


def model(dtype: torch.dtype = F64) -> dict[str, nn.Parameter]:
    """Returns two plain parameters of one group, one of another, and a covered one of the first."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"scale": (3,), "covered": (2, 2), "shift": (3,), "position.table": (4, 2)}
    return {name: nn.Parameter(torch.randn(s, dtype=F64, generator=generator).to(dtype)) for name, s in shapes.items()}


def groups_of(p: dict[str, nn.Parameter], lr: float = 0.5, first_lr: float = 0.5) -> list[dict[str, Any]]:
    return [
        {"params": [p["scale"], p["covered"], p["shift"]], "lr": lr, "first_lr": first_lr},
        {"params": [p["position.table"]], "lr": lr / 5, "first_lr": first_lr / 5},
    ]


def gradients_of(p: dict[str, nn.Parameter], step: int) -> dict[nn.Parameter, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {p[name]: torch.randn(p[name].shape, dtype=F64, generator=generator) for name in NAMES}


def named(p: dict[str, nn.Parameter]) -> dict[nn.Parameter, str]:
    return {p[name]: name for name in NAMES}


def started(steps: int = 3) -> tuple[dict[str, nn.Parameter], Fallback]:
    p = model()
    fallback = Fallback(groups_of(p), named(p), CONFIG)
    for step in range(steps):
        fallback.step(groups_of(p), gradients_of(p, step))
    return p, fallback


def test_steps_are_adamws_at_an_lr_that_follows_the_groups() -> None:
    ours, theirs = model(), model()
    fallback = Fallback(groups_of(ours), named(ours), CONFIG)
    adamw = torch.optim.AdamW([theirs[n] for n in NAMES], betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)

    for step, lr in enumerate([0.5, 0.25, 1.0, 0.0]):
        gradients = gradients_of(theirs, step)
        for p, gradient in gradients.items():
            p.grad = gradient
        adamw.param_groups[0]["lr"] = 0.01 * lr / 0.5
        adamw.step()
        fallback.step(groups_of(ours, lr), gradients_of(ours, step))

    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert torch.equal(ours["covered"], model()["covered"])


@pytest.mark.parametrize(("lr", "moves"), [(0.0, False), (0.3, True)])
def test_a_group_that_began_at_zero_moves_once_its_lr_is_not(lr: float, moves: bool) -> None:
    p = model()
    fallback = Fallback(groups_of(p), named(p), CONFIG)

    fallback.step(groups_of(p, lr, first_lr=0.0), gradients_of(p, 0))

    # AdamW's first step moves every entry by lr, up to eps and decay.
    moved = (p["scale"] - model()["scale"]).abs().max().item()
    assert moved == pytest.approx(0.01 if moves else 0.0, rel=0.5)


def test_gradients_of_the_user_stay_as_they_were() -> None:
    p = model()
    fallback = Fallback(groups_of(p), named(p), CONFIG)
    p["scale"].grad = own = torch.full((3,), 7.0, dtype=F64)

    fallback.step(groups_of(p), gradients_of(p, 0))

    assert p["scale"].grad is own
    assert own.tolist() == [7.0, 7.0, 7.0]
    assert p["shift"].grad is None


def test_gradients_of_the_user_survive_a_step_that_fails() -> None:
    p = model()
    fallback = Fallback(groups_of(p), named(p), CONFIG)
    p["scale"].grad = own = torch.ones(3, dtype=F64)
    wrong = gradients_of(p, 0) | {p["shift"]: torch.ones(5, dtype=F64)}

    with pytest.raises(RuntimeError, match="size"):
        fallback.step(groups_of(p), wrong)

    assert p["scale"].grad is own
    assert p["shift"].grad is None


def test_gradients_of_another_dtype_are_converted() -> None:
    p = model(torch.bfloat16)
    fallback = Fallback(groups_of(p), named(p), CONFIG)

    fallback.step(groups_of(p), gradients_of(p, 0))

    assert not torch.equal(p["scale"], model(torch.bfloat16)["scale"])


def test_a_model_without_plain_parameters_needs_no_special_case() -> None:
    p = model()
    fallback = Fallback(groups_of(p), {}, CONFIG)

    fallback.step(groups_of(p), {})
    fallback.load_state_dict(fallback.state_dict())

    assert fallback.state_dict() == {}
    assert torch.equal(p["scale"], model()["scale"])


def test_a_loaded_state_takes_the_same_next_step_under_other_groups() -> None:
    p, fallback = started()
    q = {name: nn.Parameter(value.detach().clone()) for name, value in p.items()}
    one_group = [{"params": [q[n] for n in reversed(NAMES)], "lr": 0.5, "first_lr": 0.5}]
    resumed = Fallback(one_group, named(q), CONFIG)

    resumed.load_state_dict(copy.deepcopy(fallback.state_dict()))
    resumed.step(one_group, gradients_of(q, 9))
    fallback.step(groups_of(p), gradients_of(p, 9))

    for name in p:
        assert torch.equal(p[name], q[name]), name


def test_a_loaded_state_is_a_copy() -> None:
    _, fallback = started()
    saved = copy.deepcopy(fallback.state_dict())
    p = model()
    resumed = Fallback(groups_of(p), named(p), CONFIG)

    resumed.load_state_dict(saved)
    resumed.step(groups_of(p), gradients_of(p, 9))

    torch.testing.assert_close(saved, fallback.state_dict(), rtol=0, atol=0)


def test_a_state_from_before_the_first_step_starts_again() -> None:
    p, fallback = started()
    fallback.load_state_dict({})
    fresh = {name: nn.Parameter(value.detach().clone()) for name, value in p.items()}
    other = Fallback(groups_of(fresh), named(fresh), CONFIG)

    fallback.step(groups_of(p), gradients_of(p, 9))
    other.step(groups_of(fresh), gradients_of(fresh, 9))

    assert torch.equal(p["scale"], fresh["scale"])


def test_a_state_of_another_model_is_refused() -> None:
    _, fallback = started()
    saved = fallback.state_dict()
    other = {("moved" if name == "shift" else name): state for name, state in saved.items()}

    with pytest.raises(CheckpointError, match=r"missing \['shift'\], unknown \['moved'\]"):
        fallback.load_state_dict(other)


def test_a_state_of_another_shape_is_refused_and_nothing_is_taken_over() -> None:
    p, fallback = started()
    saved = copy.deepcopy(fallback.state_dict())
    saved["shift"]["exp_avg"] = torch.zeros(5)

    with pytest.raises(CheckpointError, match=r"exp_avg of 'shift' must be of shape \(3,\), got \(5,\)"):
        fallback.load_state_dict(saved)

    assert fallback.state_dict()["shift"]["exp_avg"].shape == p["shift"].shape
