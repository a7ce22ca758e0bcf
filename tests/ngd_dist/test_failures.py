"""A rank that raises, hangs or dies: the others end too, in bounded time, and say which rank and why."""

import datetime
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ngd_dist import NGD
from ngd_dist.distributed import postmortem
from ngd_dist.distributed.comm import Communicator
from ngd_dist.distributed.postmortem import Postmortem
from ngd_dist.errors import CaptureError, CollectiveError, NgdError
from tests.support.ranks import run_survivors

TIMEOUT_S = 3.0
BOUND_S = 60.0  # generous: what matters is that it is not the half hour of a group's default timeout
ERROR = "layer 'fc': ran twice in one step"


def fail(how: str, comm: Communicator) -> None:
    """Ends, hangs or breaks this rank, as a user's process would."""
    if how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "is stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how.startswith("raises"):
        comm.post_error(ERROR)
    if how == "raises and exits":
        raise CaptureError(ERROR)
    time.sleep(10 * BOUND_S)


def failure_of_a_collective(comm: Communicator) -> tuple[float, str]:
    """Returns how long the collective took to raise, and what."""
    start_s = time.monotonic()
    with pytest.raises(CollectiveError) as caught:
        comm.all_reduce("directions", torch.ones(1000))
    return time.monotonic() - start_s, str(caught.value)


def meet_a_failure(rank: int, world_size: int, how: str, culprit: int) -> tuple[float, str]:
    comm = Communicator()
    comm.barrier("start")
    if rank == culprit:
        time.sleep(0.5)  # the others wait in the collective by then
        fail(how, comm)
    return failure_of_a_collective(comm)


def survivors(world_size: int, how: str, *, culprit: int, timeout_s: float = TIMEOUT_S) -> dict[int, tuple[float, str]]:
    return run_survivors(world_size, meet_a_failure, how, culprit, doomed={culprit}, timeout_s=timeout_s)


@pytest.mark.ranks
@pytest.mark.parametrize("how", ["raises and exits", "raises and hangs"])
def test_the_error_of_one_rank_reaches_all_others(how: str) -> None:
    for rank, (elapsed_s, message) in survivors(3, how, culprit=1).items():
        assert f"collective 'directions' failed on rank {rank} of 3: rank 1 raised: {ERROR}" in message
        assert "did not arrive" not in message
        assert elapsed_s < BOUND_S


@pytest.mark.ranks
def test_a_rank_that_hangs_is_named_by_all_others() -> None:
    for rank, (elapsed_s, message) in survivors(3, "hangs", culprit=2).items():
        assert f"collective 'directions' failed on rank {rank} of 3: rank 2 did not arrive" in message
        assert elapsed_s < BOUND_S


@pytest.mark.ranks
def test_a_rank_that_dies_is_named_by_all_others_before_the_timeout() -> None:
    # In a ring of four, rank 0 exchanges with ranks 1 and 3 alone: they must pass on that rank 2 died.
    for rank, (elapsed_s, message) in survivors(4, "is killed", culprit=2, timeout_s=2 * BOUND_S).items():
        assert f"collective 'directions' failed on rank {rank} of 4: rank 2 did not arrive" in message
        assert elapsed_s < BOUND_S


@pytest.mark.ranks
@pytest.mark.parametrize("how", ["is killed", "is stopped"])
def test_the_loss_of_the_store_is_said(how: str) -> None:
    # Without a launcher rank 0 hosts the store. Stopped, it leaves the others with a store that never answers.
    elapsed_s, message = survivors(2, how, culprit=0)[1]

    assert "collective 'directions' failed on rank 1 of 2: who is to blame is unknown: the group's store" in message
    assert elapsed_s < BOUND_S


def arrive_late(rank: int, world_size: int) -> tuple[float, str]:
    comm = Communicator()
    comm.barrier("start")
    time.sleep((TIMEOUT_S + 1) * rank)
    return failure_of_a_collective(comm)


@pytest.mark.ranks
def test_a_rank_later_than_the_timeout_learns_who_gave_up() -> None:
    _, message = run_survivors(2, arrive_late, doomed=set(), timeout_s=TIMEOUT_S)[1]

    assert "failed on rank 1 of 2: every rank arrived, and rank 0 failed first" in message
    assert "Timed out" in message


def meet_a_failure_in_a_subgroup(rank: int, world_size: int) -> tuple[float, str] | None:
    subgroup = dist.new_group([0, 2], timeout=datetime.timedelta(seconds=TIMEOUT_S))
    if rank == 1:
        return None
    comm = Communicator(subgroup)
    if rank == 2:
        fail("raises and hangs", comm)
    return failure_of_a_collective(comm)


@pytest.mark.ranks
def test_ranks_of_a_subgroup_are_told_apart_from_global_ones() -> None:
    _, message = run_survivors(3, meet_a_failure_in_a_subgroup, doomed={2}, timeout_s=BOUND_S)[0]

    assert f"failed on rank 0 of 2: rank 1 (global rank 2) raised: {ERROR}" in message


def go_on_after_an_error(rank: int, world_size: int) -> tuple[float, str]:
    Communicator().post_error("a bad batch on every rank, which the caller skips")
    comm = Communicator()
    comm.barrier("next")
    if rank == 1:
        fail("hangs", comm)
    return failure_of_a_collective(comm)


@pytest.mark.ranks
def test_an_error_that_a_rank_survived_is_not_blamed_later() -> None:
    _, message = run_survivors(2, go_on_after_an_error, doomed={1}, timeout_s=TIMEOUT_S)[0]

    assert "rank 1 did not arrive" in message
    assert "raised" not in message


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[Postmortem]]:
    """Returns a maker of the reports of `n` ranks in one process, over one store."""
    monkeypatch.setattr(postmortem, "PATIENCE_S", 0.3)
    monkeypatch.setattr(postmortem, "LINGER_S", 0.0)
    store = dist.HashStore()
    return lambda n: [Postmortem(rank, [f"rank {r}" for r in range(n)], lambda: store) for rank in range(n)]


def test_a_collective_called_out_of_order_is_named(board: Callable[[int], list[Postmortem]]) -> None:
    ranks = board(2)
    for rank, name in zip(ranks, ["A", "G"], strict=True):
        rank.failed("sizes differ", rank.enter(name))

    assert ranks[0].explain().startswith("rank 1 called 'G' instead; every rank must call the same collectives")
    assert ranks[1].explain().startswith("rank 0 called 'A' instead; every rank must call the same collectives")


def test_the_first_of_many_errors_is_quoted_and_the_missing_are_listed(
    board: Callable[[int], list[Postmortem]],
) -> None:
    ranks = board(16)
    for rank in (3, 1, 2):
        ranks[rank].raised(f"layer {rank}\nbroke")
    ranks[0].failed("closed", ranks[0].enter("A"))

    assert ranks[0].explain() == (
        "rank 3 (and 2 more) raised: layer 3\nbroke; rank 4, rank 5, rank 6, rank 7, rank 8, rank 9, rank 10, rank 11 "
        "and 4 more did not arrive: died, hang, or were still busy 0.3 s later"
    )


def test_an_error_that_follows_from_a_failed_collective_is_not_an_error_of_its_own(
    board: Callable[[int], list[Postmortem]],
) -> None:
    ranks = board(2)
    for rank in ranks:
        rank.failed("timed out", rank.enter("A"))
    ranks[0].raised("collective 'A' failed")

    assert ranks[1].explain() == "every rank arrived, and rank 0 failed first: timed out"


def test_a_group_formed_again_over_the_same_store_forgets_the_earlier_failure(
    board: Callable[[int], list[Postmortem]],
) -> None:
    board(2)[1].raised("of an earlier life")

    first, _ = board(2)
    first.failed("closed", first.enter("A"))

    assert first.explain() == "rank 1 did not arrive: died, hangs, or was still busy 0.3 s later"


def test_the_wait_for_a_report_ends_when_it_comes(board: Callable[[int], list[Postmortem]]) -> None:
    postmortem.PATIENCE_S = 30.0  # the fixture puts it back
    first, second = board(2)
    first.failed("closed", first.enter("A"))
    threading.Timer(0.2, second.raised, ["late"]).start()
    start_s = time.monotonic()

    assert first.explain() == "rank 1 raised: late"
    assert time.monotonic() - start_s < 15


def fail_aside(rank: int, world_size: int, culprit: int) -> tuple[float, str]:
    """Rank 1 waits over links aside for a rank that dies, rank 0 over those of the group for rank 1."""
    comm = Communicator()
    aside = comm.aside()
    comm.barrier("start")
    if rank == culprit:
        time.sleep(0.5)
        os._exit(1)
    start_s = time.monotonic()
    with pytest.raises(CollectiveError) as caught:
        wait_for_the_next(rank, comm, aside)
    return time.monotonic() - start_s, str(caught.value)


def wait_for_the_next(rank: int, comm: Communicator, aside: Communicator) -> None:
    if rank == 0:
        comm.broadcast("first", torch.ones(9), src=1)
    else:
        aside.begin_exchange("statistics", [torch.ones(9)] * 3, [9] * 3, kind="A").wait()


@pytest.mark.ranks
def test_a_rank_that_dies_ends_what_waits_over_either_links_and_is_named() -> None:
    found = run_survivors(3, fail_aside, 2, doomed={2}, timeout_s=1.5 * BOUND_S)

    for rank, name in {0: "first", 1: "statistics"}.items():
        elapsed_s, message = found[rank]
        assert elapsed_s < BOUND_S  # not the group's timeout
        assert f"collective {name!r} failed on rank {rank} of 3: rank 2 did not arrive" in message


def test_collectives_over_other_links_are_not_compared(board: Callable[[int], list[Postmortem]]) -> None:
    first, second = board(2)
    first.failed("closed", first.enter("statistics", is_aside=True))
    second.failed("closed", second.enter("gradients"))

    assert second.explain() == "every rank arrived, and rank 0 failed first: closed"


def refuses_an_input(rank: int, world_size: int) -> str:
    """Rank 1 gives a layer an input that has no samples: its hook raises, and the others wait for its statistics."""
    optimizer = NGD(model := nn.Linear(3, 2))
    try:
        for step in range(2):
            optimizer.zero_grad()
            x = torch.ones(3) if (rank, step) == (1, 1) else torch.ones(4, 3)
            model(x).sum().backward()
            optimizer.step()
    except NgdError as error:
        if isinstance(error, CaptureError):
            os._exit(1)  # as a training script would end
        return str(error)
    return "nothing"


def test_an_error_in_a_hook_of_one_rank_names_the_layer_on_all_others() -> None:
    found = run_survivors(2, refuses_an_input, doomed={1}, timeout_s=20.0)

    assert "failed on rank 0 of 2" in found[0]
    assert "rank 1 raised: layer '' needs an input of shape [samples, ..., inputs], got [3]" in found[0]
