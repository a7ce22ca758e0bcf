"""What ranks tell of themselves: their phases, and the resources of their processes."""

import sys
import time
from itertools import pairwise

import psutil
import pytest
import torch

from ngd_dist.distributed.comm import Communicator
from ngd_workers.contract.events import Ranks
from ngd_workers.launch.attempt import run_rank
from ngd_workers.train.ranks import EVERY_S, MOST_RANKS, RESOURCES, RankWatch, Usage
from tests.support.attempts import make_attempt, records, small_spec, spooled
from tests.support.optimizers import OPTIMIZERS
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def step(watch: RankWatch, comm: Communicator, seconds: dict[str, float]) -> Ranks | None:
    """Takes one step as the loop does; returns what all ranks have told in it."""
    numbers = torch.tensor(watch.outgoing(), dtype=torch.float64)
    comm.all_reduce("step", numbers)
    told = watch.incoming(numbers.tolist())
    watch.add(seconds)
    return told


def with_a_straggler(rank: int, world_size: int) -> list[Ranks | None]:
    comm, clock = Communicator(None), Clock()
    watch = RankWatch(comm, Usage(CPU), clock)
    told = []
    for _ in range(4):
        clock.now_s += EVERY_S / 2
        told.append(step(watch, comm, {"data": 1.0 + rank, "forward_backward": 0.5}))
    return told


@pytest.mark.ranks
def test_every_rank_tells_its_phases_so_that_a_straggler_is_seen() -> None:
    of_ranks = run_ranks(2, with_a_straggler)

    assert [told is None for told in of_ranks[0]] == [True, True, False, True]
    told = of_ranks[0][2]
    assert told is not None
    assert told.steps == 2
    assert told.seconds == {"data": [1.0, 2.0], "forward_backward": [0.5, 0.5]}
    assert all(value is not None and value > 2**20 for value in told.memory_bytes)
    assert told.gpu == [None, None]
    assert of_ranks[1][2] == told


def test_ranks_are_asked_once_in_some_seconds() -> None:
    comm, clock = Communicator(None), Clock()
    watch = RankWatch(comm, Usage(CPU), clock)
    told_at = []
    for number in range(200):
        clock.now_s += 0.1
        if step(watch, comm, {"data": 0.1}) is not None:
            told_at.append(number)

    gaps = [later - earlier for earlier, later in pairwise(told_at)]
    assert gaps
    assert all(gap == pytest.approx(10 * EVERY_S, abs=2) for gap in gaps)


def test_more_ranks_than_an_event_may_tell_of_send_no_row() -> None:
    comm, clock = Communicator(None), Clock()
    comm.rank, comm.world_size = MOST_RANKS, MOST_RANKS + 1  # it only counts here
    watch = RankWatch(comm, Usage(CPU), clock)
    watch.add({"data": 1.0})
    watch.incoming([1.0])

    sent = watch.outgoing()

    assert len(sent) > MOST_RANKS
    assert set(sent) == {0.0}


def test_usage_is_that_of_this_process() -> None:
    usage = Usage(CPU)
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        sum(range(1000))

    read = usage.read()

    assert read.keys() == set(RESOURCES)
    assert read["memory_bytes"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)
    assert read["cpu"] is not None
    assert 0.1 < read["cpu"] < 2 * (psutil.cpu_count() or 1)
    assert read["sent_bytes_per_s"] is not None
    assert read["sent_bytes_per_s"] >= 0
    assert (read["gpu"], read["gpu_memory_bytes"]) == (None, None)


def test_without_psutil_a_job_goes_on_and_its_workers_tell_none(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    attempt = make_attempt(tmp_path, small_spec())

    assert run_rank(attempt).result == "succeeded"

    told = next(record.ranks for record in records(spooled(attempt)) if record.ranks is not None)
    assert (told.cpu, told.memory_bytes, told.sent_bytes_per_s) == ([None], [None], [None])
    assert told.seconds["forward_backward"][0] > 0


def test_a_job_tells_its_ranks_its_layers_and_the_bytes_of_all_its_steps(tmp_path) -> None:
    attempt = make_attempt(tmp_path, small_spec(optimizer=OPTIMIZERS["ngd"]))

    run_rank(attempt)

    events = spooled(attempt)
    started, steps = events[0], records(events)
    assert len(started.hosts) == 1
    told = [record.layers for record in steps if record.layers is not None]
    assert [layers.step for layers in told] == [record.step - 1 for record in steps[1:]]
    assert all(len(layers.cosines) == len(started.layers) > 0 for layers in told)
    assert all(0 < cosine <= 1 for layers in told for cosine in layers.cosines)
    ranks = [record.ranks for record in steps if record.ranks is not None]
    assert len(ranks) >= 1
    assert set(ranks[0].seconds) >= {"data", "forward_backward", "update"}
    assert [record.bytes_so_far for record in steps] == [0] * len(steps)  # one rank sends nothing
