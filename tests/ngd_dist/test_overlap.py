"""Statistics leave while the backward pass is running, and nothing is ever left on its way."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ngd_dist import NGD, NGDConfig
from ngd_dist.distributed.comm import Communicator, Pending
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.ranks

SETTINGS: dict[str, Any] = {"strategy": {"kind": "owner_sharded", "replicate_below": 0}, "staleness": {"kind": "fixed"}}
ONE_EACH = 1e-6  # MiB: every statistic is a bucket of its own


def build_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def optimizer_of(model: nn.Module, **settings: Any) -> NGD:
    return NGD(model, NGDConfig.model_validate(SETTINGS | {"bucket_mb": ONE_EACH} | settings))


def batch(step: int, rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 5, dtype=torch.float64, generator=generator)
    y = torch.randint(3, (16,), generator=generator)
    return x.chunk(world_size)[rank], y.chunk(world_size)[rank]


@contextmanager
def recorded() -> Iterator[list[str]]:
    """Collects the names of exchanges as they are launched, and again as they are waited for."""
    events: list[str] = []
    begin = Communicator.begin_exchange

    def recording(self: Communicator, name: str, *args: Any, **kwargs: Any) -> Pending[Any]:
        events.append(f"launch {name}")
        pending = begin(self, name, *args, **kwargs)

        def wait() -> Any:
            events.append(f"wait {name}")
            return pending.wait()

        return Pending(wait)

    with mock.patch.object(Communicator, "begin_exchange", recording):
        yield events


def one_step(rank: int, world_size: int, settings: dict[str, Any], *, wraps: bool = False) -> list[str]:
    """Returns what happened in a step, in order: exchanges, and where backward and step began.

    It is the second one: the first shows that no pass comes after another, so that statistics need not wait for it.
    """
    model = build_model()
    forward = DistributedDataParallel(model) if wraps else model
    optimizer = optimizer_of(forward, **settings)
    x, y = batch(0, rank, world_size)
    micro = optimizer.config.micro_batches
    with recorded() as events:
        model[0].weight.register_post_accumulate_grad_hook(lambda _: events.append("gradient of the first layer"))
        for _ in range(2):
            events.clear()
            optimizer.zero_grad()
            for part, target in zip(x.chunk(micro), y.chunk(micro), strict=True):
                output = forward(part)
                optimizer.fisher_backward(output)
                events.append("backward")
                (F.cross_entropy(output, target) / micro).backward()
            events.append("step")
            optimizer.step()
    return events


def in_every_setting(rank: int, world_size: int) -> dict[str, list[str]]:
    cases: dict[str, dict[str, Any]] = {
        "each": {},
        "micro-batches": {"micro_batches": 2},
        "sampled": {"fisher": {"kind": "monte_carlo", "samples": 2}},
        "one bucket": {"bucket_mb": 25.0},
        "no overlap": {"bucket_mb": 0.0},
        "all_reduce": {"strategy": {"kind": "all_reduce"}},
    }
    found = {name: one_step(rank, world_size, settings) for name, settings in cases.items()}
    return found | {"ddp": one_step(rank, world_size, {}, wraps=True)}


@pytest.fixture(scope="module")
def events() -> list[dict[str, list[str]]]:
    return run_ranks(2, in_every_setting)


def launched(events: list[str]) -> list[str]:
    return [event for event in events if event.startswith("launch statistics")]


@pytest.mark.parametrize("case", ["each", "micro-batches", "all_reduce", "ddp"])
def test_statistics_leave_before_backward_has_reached_the_first_layer(
    events: list[dict[str, list[str]]], case: str
) -> None:
    for found in (rank[case] for rank in events):
        last_pass = found[len(found) - found[::-1].index("backward") :]
        before = last_pass[: last_pass.index("gradient of the first layer")]

        assert launched(before)[0].startswith("launch statistics of 4.")
        assert launched(found) == launched(last_pass)  # nothing before the last micro-batch
        assert not any(event.startswith("wait") for event in found[: found.index("step")])


def test_every_rank_launches_the_same_in_the_same_order(events: list[dict[str, list[str]]]) -> None:
    for case in events[0]:
        first, second = ([event for event in rank[case] if event.startswith("launch")] for rank in events)
        assert first == second


def test_statistics_of_a_sampled_fisher_leave_before_the_loss_is_differentiated(
    events: list[dict[str, list[str]]],
) -> None:
    found = events[0]["sampled"]

    assert len(launched(found)) == len(launched(found[: found.index("backward")])) == 6


def test_statistics_leave_in_step_where_buckets_are_off(events: list[dict[str, list[str]]]) -> None:
    found = events[0]["no overlap"]

    assert launched(found)
    assert launched(found) == launched(found[found.index("step") :])


def test_a_bucket_goes_as_a_whole(events: list[dict[str, list[str]]]) -> None:
    assert launched(events[0]["one bucket"]) == ["launch statistics of 4.G to 0.A"]


def go_on_after_trouble(rank: int, world_size: int) -> dict[str, Any]:
    """Leaves steps unfinished in every way, and returns what the steps that follow say and do."""
    found: dict[str, Any] = {}
    model = build_model()
    optimizer = optimizer_of(model, non_finite="skip")
    x, y = batch(0, rank, world_size)

    model(x).sum()  # a forward pass that is never differentiated
    F.cross_entropy(model(x * (float("nan") if rank == 1 else 1.0)), y).backward()
    optimizer.step()
    found["skipped"] = optimizer.stats.skipped_steps

    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    if rank == 0:
        F.cross_entropy(model(x), y).backward()  # another pass, after the statistics of the first have left
    optimizer.step()
    found["unmeasured"] = optimizer.stats.ages

    optimizer.zero_grad()
    state = optimizer.state_dict()
    if rank == 0:  # half a step, given up for an older state: rank 1 has sent nothing of it
        F.cross_entropy(model(x), y).backward()
    optimizer.load_state_dict(state)

    optimizer.zero_grad()
    output = model[:2](x) if rank == 1 else model(x)  # rank 1 leaves the last layers out
    output.square().sum(1).mean().backward()
    optimizer.step()
    found["weights"] = [p.detach().clone() for p in model.parameters()]
    found["ages"] = optimizer.stats.ages
    return found


def test_what_is_left_unfinished_neither_hangs_nor_counts() -> None:
    first, second = run_ranks(2, go_on_after_trouble)

    assert first["skipped"] == second["skipped"] == 1
    assert first["unmeasured"] == second["unmeasured"] == [1] * 6  # since step 0: there is no value of them yet
    assert first["ages"] == [0] * 6
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))


def send_between_backward_and_step(rank: int, world_size: int) -> tuple[list[Tensor], list[float], bool]:
    """Returns the weights after two steps in which rank 1 leaves the last layers out, sums, and if links are made once.

    All ranks send something of their own between backward and step, as training loops do for their logs.
    """
    model = build_model()
    optimizer = optimizer_of(model)
    sums = []
    for step in range(2):
        x, _ = batch(step, rank, world_size)
        optimizer.zero_grad()
        output = model[:2](x) if rank == 1 else model(x)
        output.square().sum(1).mean().backward()
        loss = torch.ones(1)
        dist.all_reduce(loss)
        sums.append(loss.item())
        optimizer.state_dict()
        optimizer.step()
    are_made_once = Communicator().aside()._group is Communicator().aside()._group
    return [p.detach().clone() for p in model.parameters()], sums, are_made_once


def test_what_others_send_may_come_between_though_a_layer_ran_on_one_rank_alone() -> None:
    first, second = run_ranks(2, send_between_backward_and_step)

    assert first[1] == second[1] == [2.0, 2.0]
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert first[2]


SENT_CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16 to half": {"statistics_wire": "bfloat16", "strategy": SETTINGS["strategy"] | {"fraction": 0.5}},
    "ekfac to all": {"preconditioner": {"kind": "ekfac"}, "strategy": SETTINGS["strategy"] | {"fraction": 1.0}},
    "all_reduce": {"strategy": {"kind": "all_reduce"}},
    "replicated": {"strategy": {"kind": "owner_sharded"}},
}


@contextmanager
def weighed(world_size: int) -> Iterator[list[int]]:
    """Collects the bytes that torch is given for other ranks, an all-reduce as a ring sends it."""
    given: list[int] = []
    exchange, reduce = dist.all_to_all_single, dist.all_reduce

    def exchanged(incoming: Tensor, outgoing: Tensor, *args: Any, **kwargs: Any) -> Any:
        given.append(outgoing.nbytes)
        return exchange(incoming, outgoing, *args, **kwargs)

    def reduced(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        given.append(2 * tensor.nbytes * (world_size - 1) // world_size)
        return reduce(tensor, *args, **kwargs)

    with mock.patch.object(dist, "all_to_all_single", exchanged), mock.patch.object(dist, "all_reduce", reduced):
        yield given


def count_bytes(rank: int, world_size: int) -> dict[str, tuple[int, int]]:
    """Returns, by case, the bytes of three steps that were counted, and those that torch was given."""
    found = {}
    for case, settings in SENT_CASES.items():
        model = build_model()
        optimizer = optimizer_of(model, **settings)
        counted = 0
        with weighed(world_size) as given:
            for step in range(3):
                x, y = batch(step, rank, world_size)
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                counted += sum(optimizer.stats.bytes_sent.values())
        found[case] = (counted, sum(given))
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_bytes_are_counted_as_torch_is_given_them(world_size: int) -> None:
    for rank in run_ranks(world_size, count_bytes):
        for case, (counted, given) in rank.items():
            assert counted == pytest.approx(given, abs=10), case  # a division by the ranks is rounded per kind
            assert counted > 0
