"""Every method gives the single process's weights on any number of ranks, by any strategy, and after a restart."""

import copy
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.extending.method import Diagonal
from ngd_dist import NGD, NGDConfig
from ngd_dist.config import AdaptiveInterval, AllReduce, FixedInterval, OwnerSharded, Settings, Thresholds
from tests.support.methods import LOCAL, SHIPPED
from tests.support.ranks import run_ranks
from tests.support.tensors import weights

pytestmark = pytest.mark.ranks

SAVED_AT, STEPS = 5, 7
BATCH = 32
STRATEGIES: dict[str, Settings] = {
    "all_reduce": AllReduce(),
    "owner_sharded": OwnerSharded(replicate_below=0),
    "half": OwnerSharded(fraction=0.5, replicate_below=0),
    "all": OwnerSharded(fraction=1, replicate_below=0),
    "default": OwnerSharded(),
}
FIRST = "all_reduce"
STALENESS: dict[str, Settings] = {
    "every step": FixedInterval(steps=1),
    # Loose: small batches are noisy, and some refreshes should be left out.
    "adaptive": AdaptiveInterval(
        thresholds=Thresholds(A=0.6, G=0.8, S=1.5, Phi=0.6, Psi=0.6, a=0.6, g=1.5, F=1.0, D=0.6)
    ),
}
METHODS = [*(kind for kind in SHIPPED if kind not in LOCAL), Diagonal().kind]  # others: test_local.py
Case = tuple[str, str, str]
CASES: list[Case] = list(product(METHODS, STRATEGIES, STALENESS))
# No margin: the noise is measured between the parts of the batch, which are others on every number of ranks.
STALENESS["error"] = AdaptiveInterval(criterion="error", error_threshold=0.9, noise_margin=0)
CASES += list(product(METHODS, (FIRST, "default"), ["error"]))
RESUMED = [case for case in CASES if case[2] == "adaptive"]


def build_model() -> nn.Sequential:
    torch.manual_seed(0)
    # Fewer inputs and outputs than samples to each layer: in a null space with more than one dimension the basis that
    # EKFAC measures in is decided by rounding, which is another on every number of ranks.
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 6),
        nn.Tanh(),
        nn.Linear(6, 3),
    ).double()
    # Batch statistics would be each rank's own: the global batch is the same on every split only with fixed ones.
    model[1].eval()
    return model


def config(case: Case, world_size: int) -> NGDConfig:
    method, strategy, staleness = case
    settings: dict[str, Any] = {"preconditioner": {"kind": method}, "staleness": STALENESS[staleness], "lr": 0.03}
    if world_size > 1:
        settings["strategy"] = STRATEGIES[strategy]
    return NGDConfig.model_validate(settings)


def train(model: nn.Module, optimizer: NGD, steps: range, rank: int, world_size: int) -> list[int]:
    """Returns how many statistics were refreshed in each step."""
    refreshed = []
    dtype = next(model.parameters()).dtype
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, 1, 4, 4, dtype=dtype, generator=generator)
        y = torch.randint(3, (BATCH,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x.chunk(world_size)[rank]), y.chunk(world_size)[rank]).backward()
        optimizer.step()
        refreshed.append(len(optimizer.stats.refreshes))
    return refreshed


def train_case(rank: int, world_size: int, case: Case) -> dict[str, Any]:
    """Returns the weights of a whole run, and those of one that was saved and resumed on the way."""
    model = build_model()
    optimizer = NGD(model, config(case, world_size))
    refreshed = train(model, optimizer, range(SAVED_AT), rank, world_size)
    # As torch's, a state's tensors are the live ones.
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict())) if case in RESUMED else None
    refreshed += train(model, optimizer, range(SAVED_AT, STEPS), rank, world_size)
    found = {"weights": weights(model), "refreshed": refreshed}
    if saved is not None:
        model = build_model()
        optimizer = NGD(model, config(case, world_size))
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        train(model, optimizer, range(SAVED_AT, STEPS), rank, world_size)
        found["resumed"] = weights(model)
    return found


def train_every_case(rank: int, world_size: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {case: train_case(rank, world_size, case) for case in CASES}
    found["mixed"] = mixed_precision(rank, world_size)
    return found


def mixed_precision(rank: int, world_size: int) -> list[Tensor]:
    """Trains a float32 model with a float64 head by EKFAC, whose bases then travel in float64."""
    body, head = nn.Linear(16, 6), nn.Linear(6, 3).double()

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = body, head

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(torch.tanh(self.body(x.flatten(1))).double())
            return logits

    for p in (*body.parameters(), *head.parameters()):
        nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))
    model = Mixed()
    optimizer = NGD(model, config(("ekfac", "owner_sharded", "every step"), world_size))
    train(model, optimizer, range(4), rank, world_size)
    return weights(model)


@pytest.fixture(scope="module")
def alone() -> dict[Case, dict[str, Any]]:
    return {case: train_case(0, 1, case) for case in CASES if case[1] == FIRST}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest) -> list[dict[Any, Any]]:
    return run_ranks(request.param, train_every_case)


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_every_method_gives_the_single_process_weights(
    ranks: list[dict[Any, Any]], alone: dict[Case, dict[str, Any]], case: Case
) -> None:
    single = alone[case[0], FIRST, case[2]]

    assert ranks[0][case]["refreshed"] == single["refreshed"]
    for ours, theirs in zip(ranks[0][case]["weights"], single["weights"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_ranks_do_not_drift_apart_by_a_single_bit(ranks: list[dict[Any, Any]], case: Case) -> None:
    for other in ranks[1:]:
        pairs = zip(ranks[0][case]["weights"], other[case]["weights"], strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("case", RESUMED, ids=" ".join)
def test_a_resumed_run_takes_the_same_steps_bit_for_bit(ranks: list[dict[Any, Any]], case: Case) -> None:
    for rank in ranks:
        pairs = zip(rank[case]["weights"], rank[case]["resumed"], strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_adaptive_staleness_leaves_refreshes_out(alone: dict[Case, dict[str, Any]]) -> None:
    for method in METHODS:
        adaptive, every = (sum(alone[method, FIRST, kind]["refreshed"]) for kind in ("adaptive", "every step"))
        assert adaptive < every


def test_methods_differ(alone: dict[Case, dict[str, Any]]) -> None:
    found = [alone[method, FIRST, "every step"]["weights"][0] for method in METHODS]

    for i, ours in enumerate(found):
        assert not any(torch.allclose(ours, theirs, rtol=1e-3) for theirs in found[i + 1 :])


def test_bases_of_a_float32_layer_fit_it_where_others_are_float64(ranks: list[dict[Any, Any]]) -> None:
    for ours, theirs in zip(ranks[0]["mixed"], mixed_precision(0, 1), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
