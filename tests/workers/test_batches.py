import pytest
import torch

from ngd_workers.contract.errors import SpecError
from ngd_workers.train.batches import Batches, seed_step

NUM_SAMPLES, GLOBAL_SIZE = 103, 12


def batches(seed: int = 0) -> Batches:
    return Batches(NUM_SAMPLES, GLOBAL_SIZE, seed)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_shares_of_all_ranks_make_the_global_batch_of_one_rank(world_size):
    for step in range(1, 20):
        shares = [batches().share(step, rank, world_size) for rank in range(world_size)]

        assert torch.equal(torch.cat(shares), batches().share(step, 0, 1))


def test_an_epoch_shows_no_sample_twice_and_drops_the_incomplete_batch():
    plan = batches()
    epoch = torch.cat([plan.share(step, 0, 1) for step in range(1, plan.steps_per_epoch + 1)])

    assert plan.steps_per_epoch == NUM_SAMPLES // GLOBAL_SIZE
    assert len(epoch.unique()) == len(epoch) == plan.steps_per_epoch * GLOBAL_SIZE


def test_epochs_and_seeds_differ():
    plan = batches()
    first, second = (plan.share(step, 0, 1) for step in (1, 1 + plan.steps_per_epoch))

    assert not torch.equal(first, second)
    assert not torch.equal(first, batches(seed=1).share(1, 0, 1))


def test_a_batch_does_not_depend_on_what_was_asked_before():
    plan = batches()
    for step in range(1, 30):
        plan.share(step, 0, 1)

    assert torch.equal(plan.share(5, 0, 1), batches().share(5, 0, 1))


def test_too_few_samples_name_both_numbers():
    with pytest.raises(SpecError, match=r"at most the number of training samples, 103, got 104"):
        Batches(NUM_SAMPLES, 104, seed=0)


def test_noise_differs_between_steps_and_ranks_and_repeats():
    def noise(step: int, rank: int) -> float:
        seed_step(0, step, rank)
        return float(torch.rand(()))

    assert noise(1, 0) == noise(1, 0)
    assert len({noise(1, 0), noise(2, 0), noise(1, 1)}) == 3
