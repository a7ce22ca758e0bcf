"""The planner's bytes between ranks are those that the library counts."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ngd_dist import NGD, NGDConfig
from ngd_dist.cost.card import ModelCard
from ngd_dist.cost.engines import ENGINES, pieces
from ngd_dist.cost.setup import FirstOrder, Setup
from ngd_dist.cost.traffic import mean_traffic, traffic
from ngd_dist.model_card import card_of
from tests.support.ranks import run_ranks

STEPS = 7
PERIOD = 6  # a multiple of all intervals
SHARDED = {"kind": "owner_sharded", "replicate_below": 3000}
EVERY_STEP = {"kind": "fixed", "steps": 1}
# Settings, and whether DDP averages gradients.
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "owner_sharded every step": ({"strategy": SHARDED, "staleness": EVERY_STEP}, False),
    "owner_sharded adaptive": ({"strategy": SHARDED}, False),
    "owner_sharded every third": ({"strategy": SHARDED, "staleness": {"kind": "fixed", "steps": 3}}, False),
    "owner_sharded in 16 bits": ({"strategy": SHARDED, "statistics_wire": "float16", "bucket_mb": 0.001}, False),
    "held by all": ({"strategy": SHARDED | {"fraction": 1.0}, "inverse_dtype": "float16"}, False),
    "all_reduce every step": ({"strategy": {"kind": "all_reduce"}, "staleness": EVERY_STEP}, False),
    "all_reduce adaptive": ({"strategy": {"kind": "all_reduce"}, "clip": {"kind": "kl"}}, False),
    "ekfac": ({"strategy": SHARDED, "preconditioner": {"kind": "ekfac"}, "staleness": EVERY_STEP}, False),
    "lngd": ({"strategy": SHARDED, "preconditioner": {"kind": "lngd"}}, False),
    "seng": ({"strategy": SHARDED, "preconditioner": {"kind": "seng"}, "staleness": EVERY_STEP}, False),
    "seng adaptive": ({"strategy": SHARDED, "preconditioner": {"kind": "seng"}, "clip": {"kind": "kl"}}, False),
    "seng all_reduce": ({"strategy": {"kind": "all_reduce"}, "preconditioner": {"kind": "seng"}}, False),
    "seng ddp every third": (
        {"strategy": SHARDED, "preconditioner": {"kind": "seng"}, "staleness": {"kind": "fixed", "steps": 3}},
        True,
    ),
    "tkfac": ({"strategy": SHARDED, "preconditioner": {"kind": "tkfac"}}, False),
    "eva": ({"strategy": SHARDED, "preconditioner": {"kind": "eva"}}, False),
    "singd": ({"strategy": SHARDED, "preconditioner": {"kind": "singd"}}, False),
    "singd in blocks, held by all": (
        {
            "strategy": SHARDED | {"fraction": 1.0},
            "preconditioner": {"kind": "singd", "structure": "block_diagonal", "width": 8},
            "statistics_wire": "float16",
        },
        False,
    ),
    "ddp": ({"strategy": SHARDED, "staleness": {"kind": "fixed", "steps": 2}}, True),
    "averaged statistics": (
        {"strategy": SHARDED, "ema_decay": 0.5, "staleness": {"kind": "fixed", "steps": 3, "statistics_steps": 1}},
        False,
    ),
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.PReLU(), nn.Conv2d(4, 6, 3), nn.Flatten(),
        nn.Linear(6 * 16, 20), nn.ReLU(), nn.Linear(20, 5),
    )  # fmt: skip


def card() -> ModelCard:
    return card_of(net(), [torch.zeros(2, 1, 8, 8)])


def sent(rank: int, world_size: int) -> dict[str, list[tuple[dict[str, int], list[str]]]]:
    """Returns, for each case, the bytes of each step and the statistics that were due in it."""
    records = {}
    for name, (settings, is_ddp) in CASES.items():
        model = net()
        optimizer = NGD(DistributedDataParallel(model) if is_ddp else model, NGDConfig.model_validate(settings))
        records[name] = []
        generator = torch.Generator().manual_seed(rank)
        for _ in range(STEPS):
            x, y = torch.randn(8, 1, 8, 8, generator=generator), torch.randint(5, (8,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            stats = optimizer.stats
            kept = {kind: nbytes for kind, nbytes in stats.bytes_sent.items() if nbytes}
            records[name].append((kept, [refresh.statistic for refresh in stats.refreshes]))
    return records


def by_layer(statistics: list[str]) -> dict[str, list[str]]:
    due: dict[str, list[str]] = {}
    for layer, _, name in (statistic.rpartition(".") for statistic in statistics):
        due.setdefault(layer, []).append(name)
    return due


def both(rank: int, world_size: int) -> tuple[Any, Any]:
    return sent(rank, world_size), sent_at_intervals(rank, world_size)


@pytest.fixture(scope="module")
def by_rank() -> list[tuple[Any, Any]]:
    return run_ranks(2, both)


@pytest.mark.ranks
def test_each_step_of_two_ranks_sends_the_bytes_that_are_planned(by_rank: list[tuple[Any, Any]]) -> None:
    for name, (settings, is_ddp) in CASES.items():
        config = NGDConfig.model_validate(settings)
        setup = Setup(card(), config, 2, samples=8, engine_name="ddp" if is_ddp else "bare")
        for step in range(STEPS):
            due = by_layer(by_rank[0][0][name][step][1])
            is_averaged = name == "averaged statistics" and step % 3 > 0
            planned = traffic(setup, due, is_averaged=is_averaged).sent
            planned.pop("engine", None)
            for rank in range(2):
                assert by_rank[rank][0][name][step][0] == {k: v[rank] for k, v in planned.items() if v[rank]}, (
                    name,
                    step,
                )


@pytest.mark.ranks
def test_the_mean_over_a_run_is_that_of_its_schedule(by_rank: list[tuple[Any, Any]]) -> None:
    for interval in (1, 2, 3):
        for kind in ("owner_sharded", "all_reduce"):
            config = NGDConfig.model_validate(at_interval(interval, kind))
            mean = mean_traffic(Setup(card(), config, 2, samples=8)).sent
            for rank in range(2):
                expected = {name: PERIOD * nbytes[rank] for name, nbytes in mean.items() if nbytes[rank]}
                assert by_rank[rank][1][interval, kind] == pytest.approx(expected, rel=1e-12)


def at_interval(interval: int, kind: str) -> dict[str, Any]:
    return {"strategy": {"kind": kind}, "staleness": {"kind": "fixed", "steps": interval}, "stagger": 0}


def sent_at_intervals(rank: int, world_size: int) -> dict[tuple[int, str], dict[str, int]]:
    totals = {}
    for interval in (1, 2, 3):
        for kind in ("owner_sharded", "all_reduce"):
            model = net()
            optimizer = NGD(model, NGDConfig.model_validate(at_interval(interval, kind)))
            total: dict[str, int] = {}
            for _ in range(PERIOD):
                optimizer.zero_grad()
                F.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.randint(5, (8,))).backward()
                optimizer.step()
                for name, nbytes in optimizer.stats.bytes_sent.items():
                    total[name] = total.get(name, 0) + nbytes
            totals[interval, kind] = {name: nbytes for name, nbytes in total.items() if nbytes}
    return totals


def test_engines_send_what_their_collectives_do() -> None:
    model, ranks, n = card(), 4, 4 * card().parameters
    ring = n * (ranks - 1) // ranks

    def engine(name: Any, micro_batches: int = 1) -> int:
        setup = Setup(model, FirstOrder("sgd", 1), ranks, 8, micro_batches, name)
        return int(traffic(setup, {}).sent["engine"][0])

    assert engine("bare") == engine("ddp") == engine("zero0") == 2 * n * (ranks - 1) // ranks  # SGD needs DDP
    assert engine("zero1") == engine("zero2") == pytest.approx(2 * ring, abs=1)
    assert engine("fsdp") == engine("zero3") == pytest.approx(3 * ring, abs=2)
    assert engine("fsdp", micro_batches=2) == pytest.approx(5 * ring, abs=4)


def test_pieces_make_up_each_tensor() -> None:
    sizes = [10, 3, 28, 1]

    cut = pieces(ENGINES["zero1"], sizes, 4)

    assert cut is not None
    assert [sum(numbers for _, numbers in of_tensor) for of_tensor in cut] == sizes
    by_rank = [sum(numbers for of_tensor in cut for r, numbers in of_tensor if r == rank) for rank in range(4)]
    assert by_rank == [11, 11, 11, 9]


@pytest.mark.parametrize("engine", ["fsdp", "zero3", "zero1", "zero2"])
def test_pieces_go_to_owners_and_come_back_and_vanish_with_the_ranks(engine: Any) -> None:
    config = NGDConfig.model_validate({"strategy": {"kind": "owner_sharded", "replicate_below": 0}})
    numbers = 4 * (card().parameters - 1)

    for ranks in (2, 8):
        sent = traffic(Setup(card(), config, ranks, 8, engine_name=engine), {}).sent
        there, back = sum(sent["gradients"]), sum(sent["directions"])
        assert there <= numbers + 100 * ranks  # of a whole model, not of one for each rank
        assert back == pytest.approx(there, rel=0.05, abs=200 * ranks)


def test_no_owner_of_a_large_layer_gets_it_from_each_of_many_ranks() -> None:
    config = NGDConfig.model_validate({"strategy": {"kind": "owner_sharded", "replicate_below": 0}})
    few, many = (mean_traffic(Setup(card(), config, ranks, 8)).busiest for ranks in (4, 1024))

    largest = 4 * max(layer.parameters for layer in card().layers)
    of_statistics = 4 * sum(layer.remembered_numbers for layer in Setup(card(), config, 4, 8).layers.values())
    assert few["gradients"] == pytest.approx(3 * largest, rel=0.1)
    assert many["gradients"] <= 3 * 4 * card().parameters + 16 * 1024  # a part of a message is padded
    assert many["statistics"] <= 3 * of_statistics + 16 * 1024
