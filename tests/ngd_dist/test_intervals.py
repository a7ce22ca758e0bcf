"""Separate intervals of statistics and of inverses: estimates are averaged, and inverted once in a while."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import FixedInterval
from ngd_dist.statistics.staleness import Schedule, Verdict
from ngd_dist.statistics.statistic import Key
from tests.support.ranks import run_ranks
from tests.support.tensors import F64
from tests.support.work import together

EVERY = {"kind": "fixed", "steps": 3, "statistics_steps": 1}
SETTINGS = {"lr": 0.05, "damping": 0.01, "momentum": 0.0, "ema_decay": 0.5, "staleness": EVERY, "stagger": 0.0}


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def draw(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 6, dtype=F64, generator=generator), torch.randint(3, (16,), generator=generator)


def go_on(optimizer: NGD, model: nn.Module, steps: range, rank: int = 0, world_size: int = 1) -> None:
    for step in steps:
        x, y = (part.chunk(world_size)[rank] for part in draw(step))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def train(steps: int, rank: int = 0, world_size: int = 1, **more: Any) -> NGD:
    model = build()
    optimizer = NGD(model, NGDConfig.model_validate(SETTINGS | more))
    go_on(optimizer, model, range(steps), rank, world_size)
    return optimizer


def weights(optimizer: NGD) -> list[Tensor]:
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


def reference(steps: int) -> list[Tensor]:
    """Returns the weights by the formula: A and G averaged in every step, inverted in the first and every third."""
    model = build()
    average: dict[int, tuple[Tensor, Tensor]] = {}
    inverses: dict[int, tuple[Tensor, Tensor]] = {}
    weight = 0.0
    for step in range(steps):
        x, y = draw(step)
        hidden = torch.tanh(model[0](x))
        logits = model[2](hidden)
        g_last = torch.softmax(logits, 1) - F.one_hot(y, 3)
        g_first = g_last @ model[2].weight * (1 - hidden.square())
        weight = 1 + 0.5 * weight
        for layer, a, g in ((0, x, g_first), (2, hidden, g_last)):
            rows = torch.cat([a, torch.ones(len(a), 1, dtype=F64)], dim=1).detach()
            new = rows.T @ rows / 16, (g.T @ g / 16).detach()
            old = average.get(layer, new)
            average[layer] = tuple(o + (n - o) / weight for o, n in zip(old, new, strict=True))  # type: ignore[assignment]
            if step % 3 == 0:
                A, G = average[layer]
                pi = (A.diagonal().mean() / G.diagonal().mean()).sqrt()
                damped = (A, 0.1 * pi), (G, 0.1 / pi)
                inverses[layer] = tuple(torch.linalg.inv(X + d * torch.eye(len(X), dtype=F64)) for X, d in damped)  # type: ignore[assignment]
            direction = inverses[layer][1] @ (g.T @ rows / 16) @ inverses[layer][0]
            with torch.no_grad():
                model[layer].weight -= 0.05 * direction[:, :-1]
                model[layer].bias -= 0.05 * direction[:, -1]
    return [p.detach() for p in model.parameters()]


def test_statistics_are_averaged_in_every_step_and_inverted_in_every_third() -> None:
    for own, expected in zip(weights(train(8)), reference(8), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-11)


def on_rank(rank: int, world_size: int, strategy: str) -> tuple[list[Tensor], list[int]]:
    optimizer = train(0, staleness=EVERY, strategy={"kind": strategy})
    inverses = []
    for step in range(8):
        go_on(optimizer, optimizer._bare, range(step, step + 1), rank, world_size)
        inverses.append(optimizer.stats.bytes_sent.get("inverses", 0))
    return weights(optimizer), inverses


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["all_reduce", "owner_sharded"])
def test_ranks_take_the_steps_of_one_process(strategy: str) -> None:
    for found, inverses in run_ranks(2, on_rank, strategy):
        for own, expected in zip(found, reference(8), strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-11)
        assert not any(sent for step, sent in enumerate(inverses) if step % 3)


@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac", "lngd", "tkfac", "eva", "singd"])
def test_a_saved_state_goes_on_to_the_bit(preconditioner: str) -> None:
    method = {"kind": preconditioner}
    unbroken = train(8, preconditioner=method)
    saved = train(4, preconditioner=method)
    resumed = NGD(saved._bare, saved.config)
    resumed.load_state_dict(saved.state_dict())

    go_on(resumed, resumed._bare, range(4, 8))

    assert resumed.stats.step == 8
    for own, other in zip(weights(resumed), weights(unbroken), strict=True):
        assert torch.equal(own, other)


def test_a_basis_lasts_and_is_measured_in_between_its_decompositions() -> None:
    optimizer, refreshed = train(0, preconditioner={"kind": "ekfac"}), []
    for step in range(8):
        go_on(optimizer, optimizer._bare, range(step, step + 1))
        refreshed.append({r.statistic for r in optimizer.stats.refreshes if r.statistic.startswith("0.")})

    assert refreshed[0] == refreshed[3] == refreshed[6] == {"0.A", "0.G"}  # a new basis: nothing is measured in it yet
    assert all("0.S" in refreshed[step] for step in (1, 2, 4, 5, 7))


def test_inverses_of_layers_are_spread_over_steps() -> None:
    keys = [Key(f"layer {i}", name) for i in range(5) for name in ("A", "G")]
    policy = FixedInterval(steps=10, statistics_steps=1)
    schedule = Schedule(keys, together({key.layer: 1 for key in keys}), policy, stagger=0.5)
    inverted: list[set[str]] = []
    for step in range(1, 41):
        due = schedule.due(step)
        inverted.append({key.layer for key in due if schedule.inverts(step, key)})
        verdicts = {key: Verdict.CHANGED if schedule.inverts(step, key) else Verdict.AVERAGED for key in due}
        schedule.advance(step, verdicts)
        assert due == keys

    assert [len(layers) for layers in inverted[:1]] == [5]
    assert max(len(layers) for layers in inverted[1:]) == 1
    for layer in {key.layer for key in keys}:
        steps = [step for step, layers in enumerate(inverted) if layer in layers]
        assert all(5 <= later - earlier <= 10 for earlier, later in pairwise(steps))


def test_an_inverse_that_failed_is_tried_with_the_next_estimate() -> None:
    key = Key("layer", "A")
    schedule = Schedule([key], together({"layer": 1}), FixedInterval(steps=10, statistics_steps=2), stagger=0)

    schedule.advance(1, {key: Verdict.UNUSABLE})

    assert schedule.due(3) == [key]
    assert schedule.inverts(3, key)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"staleness": {"kind": "fixed", "steps": 2, "statistics_steps": 3}}, "must be <= steps, got 3 and 2"),
        ({"staleness": EVERY, "ema_decay": 0.0}, "leave out statistics_steps 1"),
        ({"staleness": EVERY, "ema_decay": 0.5, "refresh_cap": 0.5}, "refresh_cap must be at least that, got 0.5"),
    ],
)
def test_intervals_that_contradict_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        NGDConfig.model_validate(settings)
