"""The planner's bytes that a rank holds are those of its tensors."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.held_bytes import tensors_of
from ngd_dist import NGD, NGDConfig
from ngd_dist.cost.memory import bytes_held, fullest_rank
from ngd_dist.cost.setup import FirstOrder, Setup
from ngd_dist.model_card import card_of
from tests.support.ranks import run_ranks

ADAPTIVE: dict[str, Any] = {}
CASES: dict[str, dict[str, Any]] = {
    "adaptive": ADAPTIVE,
    "fixed": {"staleness": {"kind": "fixed", "steps": 1}},
    "bfloat16": {"inverse_dtype": "bfloat16"},
    "float16": {"inverse_dtype": "float16"},
    "lngd": {"preconditioner": {"kind": "lngd"}},
    "exact": {"preconditioner": {"kind": "kfac", "damping_form": "exact"}},
    "rows": {"preconditioner": {"kind": "kfac", "rows": 16}},
    "adamw fallback": {"fallback": {"kind": "adamw"}},
    "seng": {"preconditioner": {"kind": "seng"}},
    "seng sketched": {"preconditioner": {"kind": "seng", "q": 8}, "staleness": {"kind": "fixed"}},
    "seng implicit": {"preconditioner": {"kind": "seng", "q": 8, "r": 3, "max_explicit": 100}},
}
ON_RANKS: dict[str, dict[str, Any]] = {
    "owners": {"strategy": {"kind": "owner_sharded", "replicate_below": 0}},
    "small ones everywhere": {},
    "held by all": {"strategy": {"kind": "owner_sharded", "replicate_below": 0, "fraction": 1.0}},
    "all_reduce": {"strategy": {"kind": "all_reduce"}},
    "local": {"preconditioner": {"kind": "seng"}},
}
SAMPLES = 64


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.PReLU(), nn.Flatten(), nn.Linear(4 * 36, 70), nn.ReLU(),
        nn.Linear(70, 5),
    )  # fmt: skip


def held(settings: dict[str, Any], samples: int, steps: int = 4) -> dict[str, int]:
    """Returns the bytes by kind after some steps, each storage once."""
    model = net()
    optimizer = NGD(model, NGDConfig.model_validate({"damping": 0.1, "fallback": {"kind": "sgd"}} | settings))
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(samples, 1, 8, 8)), torch.randint(5, (samples,))).backward()
        weights, gradients = (
            sum(t.nbytes for t in of) for of in (model.parameters(), (p.grad for p in model.parameters()))
        )
        optimizer.step()
    curvature = optimizer._curvature
    fallback = optimizer._fallback
    seen: set[int] = set()
    return {
        "weights": weights,
        "gradients": gradients,
        "momentum": storages([dict(optimizer.state), fallback], seen),
        "statistics": storages(curvature.statistics, seen),
        "inverses": storages(curvature.caches._caches, seen),  # as they are kept: a look at one expands it
        "buffers": sum(buffer.nbytes for buffer in model.buffers()),
    }


def storages(root: object, seen: set[int]) -> int:
    """Returns the bytes of the tensors' storages that were not seen before."""
    total = 0
    for _, tensor in tensors_of(root):
        if isinstance(tensor, nn.Parameter) or tensor.untyped_storage().data_ptr() in seen:
            continue
        seen.add(tensor.untyped_storage().data_ptr())
        total += tensor.untyped_storage().nbytes()
    return total


def planned(settings: dict[str, Any], samples: int, ranks: int = 1, rank: int = 0) -> dict[str, int]:
    card = card_of(net(), [torch.zeros(2, 1, 8, 8)])
    return bytes_held(
        Setup(card, NGDConfig.model_validate({"damping": 0.1, "fallback": {"kind": "sgd"}} | settings), ranks, samples),
        rank,
    )


@pytest.mark.parametrize("case", CASES)
def test_one_process_holds_what_is_planned(case: str) -> None:
    plan = planned(CASES[case], SAMPLES)

    for kind, nbytes in held(CASES[case], SAMPLES).items():
        slack = 8 * 8 if kind == "momentum" else 0  # AdamW counts steps
        assert plan[kind] - nbytes in range(-slack, 1), kind


@pytest.mark.parametrize("samples", [20, 36])
def test_few_rows_stand_for_wide_factors(samples: int) -> None:
    real, plan = held(ADAPTIVE, samples), planned(ADAPTIVE, samples)

    assert {kind: plan[kind] for kind in real} == real


@pytest.mark.ranks
def test_each_of_two_ranks_holds_what_is_planned() -> None:
    by_rank = run_ranks(2, held_in_all_cases)

    for case, settings in ON_RANKS.items():
        for rank in range(2):
            plan = planned(settings, SAMPLES, ranks=2, rank=rank)
            assert {kind: plan[kind] for kind in by_rank[rank][case]} == by_rank[rank][case], (case, rank)


def held_in_all_cases(rank: int, world_size: int) -> dict[str, dict[str, int]]:
    return {case: held(settings, SAMPLES) for case, settings in ON_RANKS.items()}


def test_activations_are_those_that_autograd_keeps() -> None:
    model, kept = net(), dict[int, int]()

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = model(torch.randn(SAMPLES, 1, 8, 8))
    of_model = sum(kept.get(t.untyped_storage().data_ptr(), 0) for t in (*model.parameters(), *model.buffers()))

    assert planned(ADAPTIVE, SAMPLES)["activations"] == pytest.approx(sum(kept.values()) - of_model, rel=0.01)
    assert output.grad_fn is not None


def test_engines_shard_what_they_say() -> None:
    card = card_of(net(), [torch.zeros(2, 1, 8, 8)])
    whole = bytes_held(Setup(card, FirstOrder("adamw", 2), 4, 8, engine_name="ddp"))

    for name, shards in {
        "zero1": {"momentum"},
        "zero2": {"momentum", "gradients"},
        "zero3": {"momentum", "gradients", "weights"},
        "fsdp": {"momentum", "gradients", "weights"},
    }.items():
        held = bytes_held(Setup(card, FirstOrder("adamw", 2), 4, 8, engine_name=name))  # type: ignore[arg-type]
        for kind in ("weights", "gradients", "momentum"):
            assert held[kind] == pytest.approx(whole[kind] / (4 if kind in shards else 1), abs=4)


def test_the_fullest_rank_owns_most() -> None:
    card = card_of(net(), [torch.zeros(2, 1, 8, 8)])
    setup = Setup(card, NGDConfig.model_validate(ON_RANKS["owners"]), 3, 8)

    totals = [sum(bytes_held(setup, rank).values()) for rank in range(3)]

    assert totals[fullest_rank(setup)] == max(totals)


def test_an_owner_has_the_statistics_of_a_few_ranks_at_once_and_not_of_many() -> None:
    card = card_of(net(), [torch.zeros(2, 1, 8, 8)])

    def messages(ranks: int) -> int:
        setup = Setup(card, NGDConfig.model_validate(ON_RANKS["owners"]), ranks, 8)
        return bytes_held(setup, fullest_rank(setup))["messages"]

    largest = 145 * 146 // 2 + 70 * 71 // 2
    assert messages(4) - messages(3) == 4 * largest
    assert messages(64) == messages(1024)
