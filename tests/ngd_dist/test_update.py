"""The weights' update, against the rules as their sources write them."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ngd_dist.step.weights import MomentumMode, apply_
from tests.support.tensors import F64

FALLING = [0.3, 0.3, 0.2, 0.15, 0.01, 0.001]
RISING = [0.1, 0.2, 0.4, 0.3]
MODES: list[MomentumMode] = ["correct", "proportional", "chosen"]


def weights(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=F64, generator=generator)) for shape in shapes]


def directions(steps: int) -> Tensor:
    """Returns one direction per step, for a parameter of shape (3, 2)."""
    return torch.randn(steps, 3, 2, dtype=F64, generator=torch.Generator().manual_seed(1))


def group(parameters: list[nn.Parameter], **settings: float) -> dict[str, Any]:
    return {"params": parameters, "lr": 0.3, "first_lr": 0.3, "momentum": 0.9, "weight_decay": 0.0} | settings


def run(lrs: list[float], mode: MomentumMode, **settings: float) -> list[Tensor]:
    """Returns the values that one parameter had, one more than there are steps."""
    p = weights((3, 2))[0]
    state: dict[Any, dict[str, Any]] = {p: {}}
    values = [p.detach().clone()]
    for lr, direction in zip(lrs, directions(len(lrs)), strict=True):
        apply_([group([p], lr=lr, **settings)], {p: direction}, state, momentum_mode=mode)
        values.append(p.detach().clone())
    return values


def velocities(lrs: list[float], momenta: list[float]) -> list[Tensor]:
    """Returns the parameter under v <- m_t v - lr_t direction, w <- w + v."""
    w, v = weights((3, 2))[0].detach().clone(), torch.zeros(3, 2, dtype=F64)
    values = [w]
    for lr, momentum, direction in zip(lrs, momenta, directions(len(lrs)), strict=True):
        v = momentum * v - lr * direction
        w = w + v
        values.append(w)
    return values


@pytest.mark.parametrize("lrs", [FALLING, RISING])
def test_correct_momentum_is_torchs(lrs: list[float]) -> None:
    p = weights((3, 2))[0]
    sgd = torch.optim.SGD([p], lr=lrs[0], momentum=0.9)
    for lr, direction in zip(lrs, directions(len(lrs)), strict=True):
        sgd.param_groups[0]["lr"] = lr
        p.grad = direction.clone()
        sgd.step()

    ours = run(lrs, "correct")

    torch.testing.assert_close(ours[-1], p.detach(), rtol=0, atol=1e-14)


def test_correct_momentum_is_the_released_rule_while_lr_falls() -> None:
    corrected = [0.9 * lr / last if lr < last else 0.9 for last, lr in pairwise([FALLING[0], *FALLING])]

    ours = run(FALLING, "correct")

    torch.testing.assert_close(ours, velocities(FALLING, corrected), rtol=0, atol=1e-14)


def test_proportional_momentum_is_the_papers_rule() -> None:
    ours = run(FALLING, "proportional")

    expected = velocities(FALLING, [0.9 * lr / 0.3 for lr in FALLING])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-14)
    assert not torch.allclose(ours[-1], run(FALLING, "correct")[-1], rtol=1e-3)


def test_proportional_momentum_never_exceeds_the_given_one() -> None:
    ours = run(RISING, "proportional", first_lr=0.2)

    torch.testing.assert_close(ours, velocities(RISING, [0.45, 0.9, 0.9, 0.9]), rtol=0, atol=1e-14)


def test_proportional_momentum_of_a_group_that_began_at_zero_is_the_given_one() -> None:
    ours = run(RISING, "proportional", first_lr=0.0)

    torch.testing.assert_close(ours, velocities(RISING, [0.9] * 4), rtol=0, atol=1e-14)


def test_chosen_momentum_multiplies_the_last_step_itself() -> None:
    p = weights((3, 2))[0]
    state: dict[Any, dict[str, Any]] = {p: {}}
    lrs, momenta = [0.3, 0.1, 0.2, 0.4], [0.0, -0.2, 0.0, 0.7]
    expected = velocities(lrs, momenta)

    for t, direction in enumerate(directions(4)):
        apply_([group([p], lr=lrs[t], momentum=momenta[t])], {p: direction}, state, momentum_mode="chosen")

        torch.testing.assert_close(p.detach(), expected[t + 1], rtol=0, atol=1e-14)
        torch.testing.assert_close(-state[p]["momentum_buffer"], expected[t + 1] - expected[t], rtol=0, atol=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_decay_shrinks_the_weight_and_stays_out_of_the_buffer(mode: MomentumMode) -> None:
    p = weights((3, 2))[0]
    before, state = p.detach().clone(), {p: {}}
    direction = directions(1)[0]

    apply_([group([p], weight_decay=0.01)], {p: direction}, state, momentum_mode=mode)

    expected = (1 - 0.3 * 0.01) * before - 0.3 * direction
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(
        state[p]["momentum_buffer"], direction if mode == "correct" else 0.3 * direction, rtol=0, atol=0
    )


@pytest.mark.parametrize("mode", ["correct", "proportional"])
def test_no_buffer_is_kept_without_momentum(mode: MomentumMode) -> None:
    p = weights((3, 2))[0]
    state: dict[Any, dict[str, Any]] = {p: {}}

    apply_([group([p], momentum=0.0)], {p: directions(1)[0]}, state, momentum_mode=mode)

    assert state == {p: {}}


def test_each_group_moves_by_its_own_settings_and_the_rest_stays() -> None:
    fast, slow, left = weights((2,), (2,), (2,))
    before = [p.detach().clone() for p in (fast, slow, left)]
    ones = torch.ones(2, dtype=F64)
    groups = [group([fast, left], momentum=0.0, lr=1.0, weight_decay=0.5), group([slow], momentum=0.0, lr=0.1)]

    apply_(groups, {fast: ones, slow: ones}, {}, rescaled={left: 2}, rescaling="always")

    torch.testing.assert_close(fast.detach(), before[0] / 2 - 1)
    torch.testing.assert_close(slow.detach(), before[1] - 0.1)
    assert torch.equal(left.detach(), before[2])


def test_always_rescaling_gives_each_weight_the_norm_of_its_outputs() -> None:
    linear, conv, bias = weights((5, 3), (4, 2, 3, 3), (5,))
    none = {p: torch.zeros_like(p) for p in (linear, conv, bias)}
    before = [p.detach().clone() for p in (linear, conv, bias)]

    apply_(
        [group([linear, conv, bias])], none, {p: {} for p in none}, rescaled={linear: 5, conv: 4}, rescaling="always"
    )

    # The formula's 1e-9 beside norms of 3 to 9.
    torch.testing.assert_close(linear.detach(), 10**0.5 * before[0] / before[0].norm(), rtol=1e-9, atol=0)
    torch.testing.assert_close(conv.detach(), 8**0.5 * before[1] / before[1].norm(), rtol=1e-9, atol=0)
    assert torch.equal(bias.detach(), before[2])


def test_shrinking_leaves_a_small_weight_alone() -> None:
    large, small = (nn.Parameter(torch.full((2, 3), value, dtype=F64)) for value in (10.0, 0.5))
    none = {p: torch.zeros_like(p) for p in (large, small)}

    apply_([group([large, small], momentum=0.0)], none, {}, rescaled=dict.fromkeys(none, 2), rescaling="shrink")

    assert large.norm().item() == pytest.approx(2.0, rel=1e-9)
    assert torch.equal(small.detach(), torch.full((2, 3), 0.5, dtype=F64))


def test_rescaling_measures_the_weight_after_it_has_moved() -> None:
    p = nn.Parameter(torch.tensor([[3.0, 0.0]], dtype=F64))

    apply_(
        [group([p], momentum=0.0, lr=1.0)],
        {p: torch.tensor([[3.0, -7.0]], dtype=F64)},
        {},
        rescaled={p: 1},
        rescaling="always",
    )

    torch.testing.assert_close(p.detach(), torch.tensor([[0.0, 2**0.5]], dtype=F64))


@pytest.mark.parametrize("value", [0.0, 2e-4, 300.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rescaling_works_in_half_precision(value: float, dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.full((64, 1024), value, dtype=dtype))

    apply_([group([p], momentum=0.0)], {p: torch.zeros_like(p)}, {}, rescaled={p: 64}, rescaling="always")

    norm = p.detach().double().norm().item()
    assert norm == pytest.approx(128**0.5 if value else 0.0, rel=torch.finfo(dtype).eps)


@pytest.mark.parametrize("mode", MODES)
def test_an_update_reads_nothing_back_from_the_device(mode: MomentumMode) -> None:
    p = nn.Parameter(torch.empty(3, 2, device="meta"))  # any number asked of a meta tensor is an error

    apply_(
        [group([p], weight_decay=0.1)],
        {p: torch.empty(3, 2, device="meta")},
        {p: {}},
        momentum_mode=mode,
        rescaled={p: 3},
        rescaling="shrink",
    )

    assert p.is_meta
