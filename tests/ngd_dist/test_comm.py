"""The collectives: what each returns, what it counts as sent, and how its failure reads."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from ngd_dist.distributed.comm import Communicator
from ngd_dist.errors import CollectiveError
from tests.support.ranks import run_ranks, run_survivors


def test_one_process_needs_no_group() -> None:
    comm = Communicator()
    value = torch.arange(4.0)

    comm.all_reduce("A", value)
    comm.broadcast("A", value)
    comm.barrier("A")
    comm.post_error("nobody to tell")

    assert comm.begin_exchange("A", [value], [4], kind="A").wait() == [value]
    assert comm.begin_all_reduce("A", value, kinds={"A": 16}).wait() is value
    assert comm.all_gather_object("A", "own") == ["own"]
    assert (comm.rank, comm.world_size, comm.take_sent()) == (0, 1, {})


def call_every_collective(rank: int, world_size: int) -> dict[str, Any]:
    comm = Communicator()
    total, first = torch.full((3,), rank + 1.0), torch.tensor([float(rank)])
    comm.all_reduce("total", total, kind="gradients")
    # Rank r sends r + 1 numbers to rank 0, and none to rank 1.
    parts = [torch.full((rank + 1,), float(rank)), torch.empty(0)]
    exchanged = comm.begin_exchange("parts", parts, [1, 2] if rank == 0 else [0, 0], kind="A")
    mixed = comm.begin_all_reduce("mixed", torch.ones(5), kinds={"A": 8, "directions": 12})
    comm.broadcast("first", first, src=1)
    comm.barrier("end")
    return {
        "total": total.tolist(),
        "mixed": mixed.wait().tolist(),
        "exchanged": [part.tolist() for part in exchanged.wait()],
        "exchanged, asked again": [part.tolist() for part in exchanged.wait()],
        "objects": comm.all_gather_object("objects", {"rank": rank}),
        "first": first.item(),
        "sent": comm.take_sent(),
        "sent after it was taken": comm.take_sent(),
    }


@pytest.mark.ranks
def test_collectives_return_what_they_say_and_count_what_a_ring_sends() -> None:
    for rank, found in enumerate(run_ranks(2, call_every_collective)):
        assert found == {
            "total": [3.0, 3.0, 3.0],
            "mixed": [2.0] * 5,
            "exchanged": [[[0.0], [1.0, 1.0]], [[], []]][rank],
            "exchanged, asked again": [[[0.0], [1.0, 1.0]], [[], []]][rank],
            "objects": [{"rank": 0}, {"rank": 1}],
            "first": 1.0,
            # Of 2 ranks each sends half of an all-reduced buffer twice, and of an exchange what others receive.
            "sent": {"gradients": 12, "A": [8, 16][rank], "directions": 12, "control": 4},
            "sent after it was taken": {},
        }


def go_aside_in_a_part_of_the_world(rank: int, world_size: int) -> tuple[float, int, bool] | None:
    """Returns the sum over links aside, the bytes that were counted, and if there are such links under a device."""
    group = dist.new_group([1, 2])
    if rank == 0:
        return None  # takes no part
    comm = Communicator(group)
    total = torch.tensor([float(rank)])
    comm.aside().all_reduce("total", total, kind="A")
    world = dist.group.WORLD
    assert world is not None
    world.bound_device_id = torch.device("cpu", 0)
    has_links_of_its_own = comm.aside() is not comm
    world.bound_device_id = None
    return total.item(), comm.take_sent()["A"], has_links_of_its_own


@pytest.mark.ranks
def test_links_aside_are_made_by_the_ranks_of_the_group_alone() -> None:
    assert run_ranks(3, go_aside_in_a_part_of_the_world) == [None, (3.0, 4, False), (3.0, 4, False)]


COLLECTIVES = ("all_reduce", "begin_exchange", "all_gather_object", "broadcast", "barrier")


def call(comm: Communicator, collective: str) -> None:
    """Calls the collective under its own name."""
    if collective == "begin_exchange":
        comm.begin_exchange(collective, [torch.ones(4)] * 2, [4, 4], kind="A").wait()
    else:
        getattr(comm, collective)(collective, *([] if collective == "barrier" else [torch.ones(4)]))


def call_every_collective_alone(rank: int, world_size: int) -> list[str]:
    comm = Communicator()
    comm.barrier("start")
    if rank == 0:
        dist.destroy_process_group()
        raise RuntimeError("the rank that the other one misses")
    messages = []
    for collective in COLLECTIVES:
        with pytest.raises(CollectiveError) as caught:
            call(comm, collective)
        messages.append(str(caught.value))
    return messages


@pytest.mark.ranks
def test_every_collective_names_itself_in_its_error() -> None:
    messages = run_survivors(2, call_every_collective_alone, doomed={0}, timeout_s=4)[1]

    for collective, message in zip(COLLECTIVES, messages, strict=True):
        assert message.startswith(f"collective {collective!r} failed on rank 1 of 2: ")


def send_what_cannot_be_pickled(rank: int, world_size: int) -> str:
    comm = Communicator()
    expected = AttributeError if rank == 1 else CollectiveError
    with pytest.raises(expected) as caught:
        comm.all_gather_object("state_dict", (lambda: 0) if rank == 1 else 0)
    return str(caught.value)


@pytest.mark.ranks
def test_an_error_before_anything_is_sent_reaches_the_others() -> None:
    messages = run_survivors(2, send_what_cannot_be_pickled, doomed=set(), timeout_s=4)

    assert "collective 'state_dict' failed on rank 0 of 2: rank 1 raised: AttributeError: Can't pickle" in messages[0]
