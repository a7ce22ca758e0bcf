"""Ways in which other libraries of this kind crash, drift or are silently wrong; those not tested elsewhere.

docs/guides/pitfalls.md has the whole list and the test of each.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import FixedInterval
from ngd_dist.statistics.statistic import Key
from tests.support.refreshing import refresh
from tests.support.tensors import F64
from tests.support.training import train

METHODS: list[dict[str, Any]] = [{"kind": "kfac"}, {"kind": "kfac", "damping_form": "exact"}, {"kind": "ekfac"}]
METHOD_IDS = ["kfac", "kfac exact", "ekfac"]


def values(optimizer: NGD) -> dict[str, Tensor]:
    return {str(k): s.value.clone() for k, s in optimizer._curvature.statistics.items() if s.value is not None}


@pytest.mark.parametrize("method", METHODS, ids=METHOD_IDS)
def test_inverting_adds_no_damping_to_the_statistics(method: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3).double(), torch.randn(8, 4, dtype=F64), torch.randint(3, (8,))
    config = {"preconditioner": method, "staleness": FixedInterval(steps=100), "stagger": 0.0}
    optimizer = NGD(model, NGDConfig.model_validate(config))
    train(optimizer, model, x, y, 2)
    before = values(optimizer)

    for damping in (1.0, 10.0, 100.0):  # each makes the cache anew, from the same statistics
        optimizer.param_groups[0]["damping"] = damping
        train(optimizer, model, x, y, 1)

    assert all(torch.equal(value, before[name]) for name, value in values(optimizer).items())
    assert optimizer._curvature.damped_with[""] == 100.0


def test_a_layer_one_factor_of_which_is_due_is_damped_anew_as_a_whole() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3).double(), torch.randn(8, 4, dtype=F64), torch.randint(3, (8,))
    optimizer = NGD(model, NGDConfig(staleness=FixedInterval(steps=6)))
    train(optimizer, model, x, y, 1)
    tracks = optimizer._schedule.tracks
    tracks[Key("", "A")] = replace(tracks[Key("", "A")], due=100)  # as if other layers had kept it from G's step
    while not optimizer._schedule.due(optimizer.stats.step + 1):
        train(optimizer, model, x, y, 1)

    optimizer.param_groups[0]["damping"] *= 100
    train(optimizer, model, x, y, 1)

    assert len(optimizer.stats.refreshes) == 1
    method, statistics = optimizer._covered[""].method, values(optimizer)
    plain = {name.rpartition(".")[2]: value for name, value in statistics.items()}
    expected = refresh(method, plain, frozenset(), optimizer.param_groups[0]["damping"], None).cache
    assert expected is not None
    torch.testing.assert_close(dict(optimizer._curvature.caches[""] or {}), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("samples", [32, 256, 2048])
def test_g_does_not_shrink_with_the_batch(samples: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    optimizer = NGD(model)

    F.cross_entropy(model(torch.randn(samples, 4, dtype=F64)), torch.randint(3, (samples,))).backward()

    trace = {str(key): value for key, value in optimizer._capture.take().items()}[".G"].diagonal(0, 1, 2).sum()
    # p(1 - p) summed over three classes is near 2/3 for a net that knows nothing, plus its label's share.
    assert 0.4 < float(trace) < 1.2


def test_an_input_that_is_not_contiguous() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), torch.randn(5, 4, 7, dtype=F64).transpose(1, 2)
    found = []
    for inputs in (x, x.contiguous()):
        optimizer = NGD(model)
        model(inputs).square().sum((1, 2)).mean().backward()
        found.append(optimizer._capture.take())

    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_batches_of_changing_size() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    optimizer = NGD(model, NGDConfig(lr=0.02))

    for samples in (16, 7, 1, 33):
        train(optimizer, model, torch.randn(samples, 4), torch.randint(3, (samples,)), 1)

    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize("method", METHODS, ids=METHOD_IDS)
@pytest.mark.parametrize("damping", [1e-3, 1e-1, 1.0])
def test_digits_with_their_constant_pixels_train_at_any_damping(method: dict[str, Any], damping: float) -> None:
    digits = load_digits()
    x, y = torch.tensor(digits.data[:512] / 16, dtype=torch.float32), torch.tensor(digits.target[:512])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    config = {"preconditioner": method, "damping": damping, "lr": min(0.1, damping)}
    optimizer = NGD(model, NGDConfig.model_validate(config))

    losses = train(optimizer, model, x, y, 20)

    assert losses[-1] < 0.7 * losses[0]
    assert optimizer.stats.failed_inversions == 0


@pytest.mark.parametrize("method", METHODS, ids=METHOD_IDS)
def test_a_method_is_not_gradient_descent_under_another_name(method: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(6, 4).double(), torch.randn(32, 6, dtype=F64) * torch.arange(1, 7), torch.randint(4, (32,))
    config = {"preconditioner": method, "momentum": 0.0, "damping": 1e-2, "staleness": FixedInterval()}
    optimizer = NGD(model, NGDConfig.model_validate(config))
    train(optimizer, model, x, y, 2)  # EKFAC's second moments are there from the second step on
    before = model.weight.detach().clone()

    train(optimizer, model, x, y, 1)

    step, gradient = (before - model.weight.detach()).flatten(), model.weight.grad
    assert gradient is not None
    assert float(F.cosine_similarity(step, gradient.flatten(), dim=0)) < 0.95


def test_a_moving_average_weighs_the_past_by_its_own_name() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 2, bias=False).double()
    optimizer = NGD(model, NGDConfig(ema_decay=0.75, staleness=FixedInterval(), lr=1e-12))
    for size in (1.0, 3.0):
        train(optimizer, model, torch.full((4, 2), size, dtype=F64), torch.zeros(4, dtype=torch.long), 1)

    # A is 1 and then 9 in each entry; the first has weight 0.75, the second 1.
    torch.testing.assert_close(values(optimizer)[".A"], torch.full((1, 2, 2), (0.75 + 9) / 1.75, dtype=F64))
