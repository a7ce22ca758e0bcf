"""The collectives: what each returns, what it counts as sent, and how its failure reads."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from ngd_dist.comm import Communicator
from ngd_dist.errors import CollectiveError
from tests.support.ranks import run_ranks, run_survivors


def test_one_process_needs_no_group() -> None:
    comm = Communicator()
    value = torch.arange(4.0)

    comm.all_reduce("A", value)
    comm.broadcast("A", value)
    comm.barrier("A")
    comm.post_error("nobody to tell")

    assert torch.equal(comm.reduce_scatter("A", value, kind="A"), torch.arange(4.0))
    assert torch.equal(comm.all_gather("A", value, kind="A"), torch.arange(4.0))
    assert comm.all_gather_object("A", "own") == ["own"]
    assert (comm.rank, comm.world_size, comm.take_sent()) == (0, 1, {})


def call_every_collective(rank: int, world_size: int) -> dict[str, Any]:
    comm = Communicator()
    total, first = torch.full((3,), rank + 1.0), torch.tensor([float(rank)])
    comm.all_reduce("total", total, kind="gradients")
    part = comm.reduce_scatter("parts", torch.arange(4.0) + rank, kind="A")
    gathered = comm.all_gather("gather", torch.full((2,), float(rank)), kind="directions")
    comm.broadcast("first", first, src=1)
    comm.barrier("end")
    return {
        "total": total.tolist(),
        "part": part.tolist(),
        "gathered": gathered.tolist(),
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
            "part": [[1.0, 3.0], [5.0, 7.0]][rank],
            "gathered": [0.0, 0.0, 1.0, 1.0],
            "objects": [{"rank": 0}, {"rank": 1}],
            "first": 1.0,
            # Of 2 ranks each sends half of a buffer, and of an all-reduced one twice that; float32 is 4 bytes.
            "sent": {"gradients": 12, "A": 8, "directions": 8, "control": 4},
            "sent after it was taken": {},
        }


COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "all_gather_object", "broadcast", "barrier")


def call(comm: Communicator, collective: str) -> None:
    """Calls the collective under its own name."""
    if collective in ("reduce_scatter", "all_gather"):
        getattr(comm, collective)(collective, torch.ones(4), kind="A")
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
