"""Approximations are held against the whole Fisher block: the exact one has no error, and the others some."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import approximations
from benchmarks.approximations import measure, quality, rows_of, table
from ngd_dist.config import PRECONDITIONERS
from ngd_dist.config.methods.base import is_ours


def test_rows_are_those_of_each_samples_own_loss() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 3

    rows = rows_of(model, x, y)
    F.cross_entropy(model(x[:1]), y[:1]).backward()

    for layer, batch in rows:
        first = torch.einsum("bpi,bpo->boi", batch.a_BNPI[:, 0], batch.g_BNPO[:, 0])
        torch.testing.assert_close(first, layer.join([p.grad for p in layer.parameters if p.grad is not None]))


def test_the_exact_method_has_no_error_and_kfac_has() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    layer, batch = rows_of(model, torch.randn(40, 5, dtype=torch.float64), torch.arange(40) % 3)[0]

    exact, kfac = quality("seng", layer, batch), quality("kfac", layer, batch)

    assert exact == pytest.approx({"error": 0.0, "scaled_error": 0.0, "cosine": 1.0}, abs=1e-6)
    assert 0.01 < kfac["scaled_error"] <= kfac["error"] < 1
    assert 0 < kfac["cosine"] < 1


def test_every_method_has_a_line_for_each_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approximations, "STEPS", 2)
    monkeypatch.setattr(approximations, "REFRESHES", 2)
    monkeypatch.setitem(approximations.NETWORKS, "mlp", lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))

    text = table([*measure("mlp", 0, samples=20)])

    for kind in (kind for kind, choice in PRECONDITIONERS.items() if is_ours(choice)):
        assert text.count(f"| {kind} |") == 2
    assert "## After 2 steps" in text
