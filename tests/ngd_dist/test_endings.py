"""How a process ends that has called collectives: with nothing under way, no thread of gloo, and its own status."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ngd_dist import NGD
from ngd_dist.distributed.comm import Communicator, end_collectives
from ngd_dist.errors import CollectiveError
from tests.support.ranks import run_survivors
from tests.support.ways_out import gloo_threads, run_ways_out

pytestmark = pytest.mark.ranks

ENDS = {"returns": [0, 0], "destroys": [0, 0], "raises": [1, 1], "exits": [3, 3], "is_told_to_stop": [0, -15]}


@pytest.mark.slow
def test_every_way_out_of_a_process_keeps_its_status() -> None:
    ended = run_ways_out(dict.fromkeys(ENDS, 1), timeout_s=200)

    assert {pair["way"]: pair["statuses"] for pair in ended} == ENDS
    assert "Exception ignored" not in str(ended)


@pytest.fixture
def busy_machine() -> Iterator[None]:
    with ExitStack() as stack:
        for _ in range(2):
            busy = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(busy.kill)
        yield


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.usefixtures("busy_machine")
def test_200_starts_and_ends_on_a_busy_machine() -> None:
    ended = run_ways_out({"returns": 50, "destroys": 50, "raises": 50, "exits": 50}, timeout_s=2900)

    assert len(ended) == 200
    assert [pair for pair in ended if pair["statuses"] != ENDS[pair["way"]]] == []


def end_after_training(rank: int, world_size: int) -> tuple[int, list[str]]:
    """Returns how many threads gloo had before the end, and those after it, while the optimizer is still held."""
    torch.manual_seed(rank)
    model = nn.Linear(4, 3)
    optimizer = NGD(model)
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    before = gloo_threads()
    end_collectives()
    dist.destroy_process_group()
    return len(before), gloo_threads() if optimizer else []


def test_no_thread_of_gloo_is_left_after_training() -> None:
    for before, after in run_survivors(2, end_after_training, doomed=set(), timeout_s=60).values():
        assert before > 0
        assert after == []


def end_with_an_exchange_under_way(rank: int, world_size: int) -> tuple[str, list[str]]:
    """Rank 1 ends as if it had raised, with an exchange under way that rank 0 takes no part in."""
    comm = Communicator()
    aside = comm.aside()
    if rank == 1:
        left = aside.begin_exchange("left behind", [torch.ones(4)] * 2, [4, 4], kind="A")
        end_collectives(is_broken=True)
        with pytest.raises(CollectiveError):
            left.wait()
        collective = comm
    else:
        collective = comm
        with pytest.raises(CollectiveError):
            comm.barrier("that rank 1 never enters")
        end_collectives(is_broken=True)
    with pytest.raises(CollectiveError) as caught:
        collective.barrier("late")
    dist.destroy_process_group()
    return str(caught.value), gloo_threads()


def test_an_exchange_that_a_rank_leaves_behind_ends_and_fails_the_others_at_once() -> None:
    ended = run_survivors(2, end_with_an_exchange_under_way, doomed=set(), timeout_s=60)

    for message, threads in ended.values():
        assert message == "collective 'late' came after end_collectives(); make a new Communicator"
        assert threads == []
