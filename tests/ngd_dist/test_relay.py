"""Where one rank would get much from each of many, sums and messages go in two hops, and the weights are the same."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ngd_dist import NGD, NGDConfig
from ngd_dist.cost.card import ModelCard
from ngd_dist.cost.relay import cut, filled, relays
from ngd_dist.cost.setup import Setup
from ngd_dist.cost.traffic import traffic
from ngd_dist.distributed import buckets, exchange, sync
from ngd_dist.model_card import card_of
from tests.support.ranks import run_ranks
from tests.support.tensors import weights

RANKS, STEPS, SAMPLES, CLASSES = 6, 3, 24, 60
ALONE = {"kind": "owner_sharded", "replicate_below": 0}
BY_ALL = ALONE | {"fraction": 1.0}
# Settings, and the engine that averages.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "owners": ({"strategy": ALONE}, "bare"),
    "owners, small buckets": ({"strategy": ALONE, "bucket_mb": 1e-3}, "bare"),
    "owners under ddp": ({"strategy": ALONE}, "ddp"),
    "held by all": ({"strategy": BY_ALL}, "bare"),
    "inverted by all": ({"strategy": {"kind": "all_reduce"}}, "bare"),
    "ekfac": ({"strategy": ALONE, "preconditioner": {"kind": "ekfac"}, "damping": 0.3}, "bare"),
    "a clip": ({"strategy": ALONE, "clip": {"kind": "kl"}}, "bare"),
}
ROUNDED = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    """One layer has most of the weights, and of the statistics."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, CLASSES)).to(dtype)


def config(name: str, **changes: Any) -> NGDConfig:
    settings = {"staleness": {"kind": "fixed", "steps": 1}, "damping": 0.1} | CASES[name][0]
    return NGDConfig.model_validate(settings | changes)


def train(optimizer: NGD, model: nn.Module, rank: int, world_size: int) -> list[tuple[dict[str, int], list[str]]]:
    """Returns the bytes of each step, and the statistics that were due."""
    records = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(SAMPLES, 5, dtype=next(model.parameters()).dtype, generator=generator).chunk(world_size)[rank]
        y = torch.randint(CLASSES, (SAMPLES,), generator=generator).chunk(world_size)[rank]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        due = [refresh.statistic for refresh in optimizer.stats.refreshes]
        records.append(({kind: sent for kind, sent in optimizer.stats.bytes_sent.items() if sent}, due))
    return records


def on_ranks(rank: int, world_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (_, engine) in CASES.items():
        for dtype in (torch.float32, torch.float64):
            model = DistributedDataParallel(net(dtype)) if engine == "ddp" else net(dtype)
            found["bytes", name, dtype] = train(NGD(model, config(name)), model, rank, world_size)
            found[name] = weights(model)
        with pytest.MonkeyPatch.context() as patched:
            for module in (buckets, exchange, sync):
                patched.setattr(module, "relays", lambda sizes, ranks: False)
            model = DistributedDataParallel(net()) if engine == "ddp" else net()
            train(NGD(model, config(name)), model, rank, world_size)
            found["direct", name] = weights(model)
    for wire in ROUNDED:
        model = net(torch.float32)
        optimizer = NGD(model, config("owners", statistics_wire=wire))
        found["bytes", wire, torch.float32] = train(optimizer, model, rank, world_size)
        found[wire] = weights(model)
    return found


def alone(name: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    model = net(dtype)
    train(NGD(model, config(name, strategy=None)), model, 0, 1)
    return weights(model)


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(RANKS, on_ranks)


@pytest.mark.ranks
@pytest.mark.parametrize("name", CASES)
def test_two_hops_change_no_bit(ranks: list[dict[str, Any]], name: str) -> None:
    for of_rank in ranks:
        for ours, direct in zip(of_rank[name], of_rank["direct", name], strict=True):
            assert torch.equal(ours, direct)


@pytest.mark.ranks
@pytest.mark.parametrize("name", [name for name in CASES if name != "ekfac"])  # its G has equal eigenvalues: any basis
def test_the_weights_are_those_of_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    for of_rank in ranks:
        for ours, theirs, first in zip(of_rank[name], alone(name), ranks[0][name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
            assert torch.equal(ours, first)


@pytest.mark.ranks
@pytest.mark.parametrize("dtype", ROUNDED)
def test_statistics_in_16_bits_are_rounded_once(ranks: list[dict[str, Any]], dtype: str) -> None:
    initial = weights(net(torch.float32))
    for ours, theirs, before in zip(ranks[0][dtype], alone("owners", torch.float32), initial, strict=True):
        moved = (theirs - before).abs().max()
        assert (ours - theirs).abs().max() < 20 * ROUNDED[dtype] * moved


@pytest.mark.ranks
@pytest.mark.parametrize("name", [*CASES, *ROUNDED])
def test_each_rank_sends_the_bytes_that_are_planned(ranks: list[dict[str, Any]], name: str) -> None:
    if name in CASES:
        setup = Setup(card(), config(name), RANKS, 4, engine_name=CASES[name][1])  # type: ignore[arg-type]
    else:
        setup = Setup(card(), config("owners", statistics_wire=name), RANKS, 4)
    for step in range(STEPS):
        due: dict[str, list[str]] = {}
        for layer, _, statistic in (one.rpartition(".") for one in ranks[0]["bytes", name, torch.float32][step][1]):
            due.setdefault(layer, []).append(statistic)
        planned = traffic(setup, due).sent
        for rank, of_rank in enumerate(ranks):
            kinds = {kind: sent[rank] for kind, sent in planned.items() if sent[rank] and kind != "engine"}
            assert of_rank["bytes", name, torch.float32][step][0] == kinds


@pytest.mark.ranks
def test_no_rank_sends_a_large_layer_to_each_of_the_others(ranks: list[dict[str, Any]]) -> None:
    largest = 4 * CLASSES * 5  # bytes of its direction
    sent = [of_rank["bytes", "owners", torch.float32][0][0]["directions"] for of_rank in ranks]

    assert max(sent) < 3 * largest < (RANKS - 1) * largest


def card() -> ModelCard:
    return card_of(net(torch.float32), [torch.zeros(2, 5)])


@given(st.lists(st.integers(1, 50), max_size=9), st.integers(1, 12))
def test_parts_are_equal_and_make_up_each_tensor(sizes: list[int], ranks: int) -> None:
    parts = cut(dict(enumerate(sizes)), ranks)

    of_rank = [sum(part.size for part in parts if part.rank == rank) for rank in range(ranks)]
    longest = -(-sum(sizes) // ranks)
    full = sum(sizes) // longest if longest else 0
    assert of_rank[:full] == [longest] * full
    assert sum(of_rank) == sum(sizes)
    for name, size in enumerate(sizes):
        ends = [(part.begin, part.end) for part in parts if part.name == name]
        assert [begin for begin, _ in ends] == [0, *(end for _, end in ends[:-1])]
        assert ends[-1][1] == size


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=64))
def test_two_hops_are_taken_where_they_are_shorter(owned: list[int]) -> None:
    ranks = len(owned)
    by_one = (ranks - 1) * max(owned)
    by_two = 2 * (sum(owned) + max(owned))

    assert relays(owned, ranks) == (by_one > by_two)
    assert not relays([max(owned)] * ranks, ranks)


def test_buckets_keep_the_order_and_the_limit() -> None:
    assert list(filled({"a": 3, "b": 4, "c": 9, "d": 1}, 8)) == [["a", "b"], ["c"], ["d"]]
    assert list(filled({"a": 3, "b": 4}, 0)) == [["a", "b"]]
    assert list(filled({}, 8)) == []
