"""Every optimizer that the benchmarks measure takes steps on a tiny model; who is missing is skipped by name."""

import math

import pytest
import torch
from torch import nn

from benchmarks.held_bytes import held_bytes
from benchmarks.models import MODELS, batches, count_parameters
from benchmarks.peers import PEERS, build, refreshes, why_not
from ngd_dist import NGD

pytestmark = pytest.mark.filterwarnings("ignore")  # rivals' deprecations are not ours to mend


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)
    )


@pytest.mark.parametrize("name", PEERS)
def test_takes_finite_steps_that_move_the_model(name: str) -> None:
    if reason := why_not(name):
        pytest.skip(f"{name}: {reason}")
    x, y = torch.randn(12, 1, 4, 4), torch.randint(3, (12,))

    for refresh in refreshes(name):
        trainer = build(name, tiny(), refresh)
        losses = [trainer.step(x, y) for _ in range(3)]

        assert all(math.isfinite(loss) for loss in losses)
        moved = [not p.equal(q) for p, q in zip(trainer.model.parameters(), tiny().parameters(), strict=True)]
        assert any(moved)
        assert set(trainer.state_bytes()) <= {"statistics", "inverses", "momentum", "kept rows", "buffers", "other"}


def test_refuses_a_refresh_that_the_optimizer_lacks() -> None:
    with pytest.raises(ValueError, match="sgd has no refresh 10/10"):
        build("sgd", tiny(), "10/10")


@pytest.mark.parametrize("name", ["mlp", "resnet20"])
def test_models_train_on_fresh_batches_of_the_size_asked_for(name: str) -> None:
    model, x, _ = MODELS[name](6)
    stream = batches(name, 6, seed=1)
    first, second = next(stream), next(stream)

    assert model(x).shape == (6, 10)
    assert not first[0].equal(second[0])
    assert next(batches(name, 6, seed=1))[0].equal(first[0])
    assert count_parameters(model) == {"mlp": 932362, "resnet20": 272186}[name]


def test_held_bytes_counts_each_storage_once_by_kind() -> None:
    shared = torch.zeros(8)
    holder = {"factor": [shared, shared.view(2, 4)], "rest": {"deep": (torch.zeros(2, dtype=torch.float64),)}}

    assert held_bytes(holder, {"factor": "statistics"}) == {"statistics": 32, "other": 16}


def test_momentum_of_ngd_is_counted_without_the_model() -> None:
    model = tiny()
    x, y = torch.randn(12, 1, 4, 4), torch.randint(3, (12,))
    trainer = build("ngd", model)
    trainer.step(x, y)

    assert isinstance(trainer.holders, NGD)  # type: ignore[attr-defined]
    assert trainer.state_bytes()["momentum"] == 4 * count_parameters(model)
