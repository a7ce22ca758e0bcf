"""The plan of samples in shards: every sample at most once an epoch, the same batches at any number of ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ngd_workers.contract.errors import SpecError
from ngd_workers.data import Shards
from ngd_workers.train.batches import Batches

CASES = st.tuples(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),  # sizes
    st.sampled_from([1, 2, 4, 8]),  # lanes
    st.integers(1, 6),  # samples of a lane in a batch
    st.integers(1, 5),  # window
    st.integers(0, 2**31 - 1),  # seed
)


def plan(case: tuple[list[int], int, int, int, int]) -> Batches | None:
    """Returns None for data that are too few for one batch."""
    sizes, lanes, per_lane, window, seed = case
    if sum(sizes) // lanes < per_lane or sum(sizes) < lanes * per_lane:
        return None
    return Batches(sum(sizes), lanes * per_lane, seed, Shards(tuple(sizes), lanes, window))


@settings(max_examples=150, deadline=None)
@given(CASES, st.integers(0, 3))
def test_an_epoch_shows_each_sample_at_most_once_and_leaves_out_less_than_a_batch_and_a_sample_a_lane(case, epoch):
    batches = plan(case)
    if batches is None:
        return
    steps = batches.steps_per_epoch
    seen = torch.cat([batches.share(epoch * steps + step, 0, 1) for step in range(1, steps + 1)])

    assert len(seen.unique()) == len(seen) == steps * batches.global_size
    assert 0 <= seen.min() <= seen.max() < batches.num_samples
    assert batches.num_samples - len(seen) < batches.global_size + case[1]


@settings(max_examples=100, deadline=None)
@given(CASES, st.integers(1, 60), st.data())
def test_global_batch_is_the_same_at_any_number_of_ranks_and_from_any_step(case, step, data):
    batches, fresh = plan(case), plan(case)
    if batches is None or fresh is None:
        return
    divisors = [n for n in range(1, batches.global_size + 1) if batches.global_size % n == 0]
    world_size = data.draw(st.sampled_from(divisors))
    batches.share(1, 0, 1)  # what was asked before does not matter

    shares = [batches.share(step, rank, world_size) for rank in range(world_size)]

    assert torch.equal(torch.cat(shares), fresh.share(step, 0, 1))


def test_every_sample_counts_once_over_two_changes_of_world_size():
    sizes = (10,) * 48
    batches = Batches(480, 48, 7, Shards(sizes, lanes=8, window=2))
    seen = []
    for first, last, world_size in ((1, 4, 4), (5, 7, 2), (8, 10, 8)):
        for step in range(first, last + 1):
            seen += [batches.share(step, rank, world_size) for rank in range(world_size)]

    assert torch.equal(torch.cat(seen).sort().values, torch.arange(480))


def test_a_rank_reads_the_files_of_its_lanes_alone():
    sizes = (16,) * 64
    batches = Batches(1024, 64, 0, Shards(sizes, lanes=16, window=1))
    for world_size in (1, 2, 4, 8, 16):
        indices = torch.cat([batches.share(step, 0, world_size) for step in range(1, batches.steps_per_epoch + 1)])

        assert len(indices.div(16, rounding_mode="floor").unique()) == 64 // world_size


def test_a_lane_reads_a_window_of_files_at_a_time():
    batches = Batches(640, 16, 0, Shards((40,) * 16, lanes=4, window=2))
    for step in range(1, batches.steps_per_epoch + 1):
        files = batches.share(step, 0, 1).div(40, rounding_mode="floor").unique()

        assert len(files) <= 4 * 3  # a batch may reach over the end of a window


def test_epochs_take_shards_in_another_order():
    batches = Batches(480, 48, 7, Shards((10,) * 48, lanes=8, window=2))

    assert not torch.equal(batches.share(1, 0, 1), batches.share(1 + batches.steps_per_epoch, 0, 1))


def test_lanes_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(SpecError, match=r"data\.lanes must divide batch\.global_size \(48\), got 7; .* or take 6"):
        Batches(480, 48, 0, Shards((10,) * 48, lanes=7))


def test_lanes_default_to_the_most_that_divide_the_batch():
    few, many = Batches(480, 48, 0, Shards((10,) * 48)), Batches(480, 100, 0, Shards((10,) * 48))

    assert (few._lanes, many._lanes) == (48, 25)
