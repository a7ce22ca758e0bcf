"""Samples of a dataset of one's own: which come, with which random numbers, and one that can't be read."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ngd_workers.contract.errors import InvalidDataError
from ngd_workers.contract.rundir import AttemptDir
from ngd_workers.contract.spec import JobSpec, Loading
from ngd_workers.data import Dataset, Images
from ngd_workers.launch.attempt import run_rank
from ngd_workers.train.batches import Batches
from ngd_workers.train.loading import Samples, read_ahead, requests_to_test, requests_to_train
from tests.support.attempts import make_attempt, records, small_spec, spooled
from tests.support.ranks import run_ranks
from tests.support.training import weights_at

SHAPE = Images(channels=1, height=2, width=2, classes=2)


class Noisy:
    """Images of their own number, plus what the three global generators draw; `bad` ones can't be read."""

    def __init__(self, length: int = 40, bad: tuple[int, ...] = (), scale: float = 1.0) -> None:
        self.length, self.bad, self.scale = length, bad, scale

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index in self.bad:
            raise InvalidDataError(f"sample {index} (image-{index}.jpg) is no image; leave it out")
        drawn = torch.rand(()) + random.random() + np.random.rand()
        x = torch.full((1, 2, 2), float(index)) + self.scale * drawn.float()
        return x / self.length, index % 2


def noisy(shape: object = None, *, bad: list[int] | None = None, skips: bool = False) -> Dataset:
    return Dataset(Noisy(bad=tuple(bad or ())), Noisy(8), SHAPE, skips_bad_samples=skips)


def pair() -> tuple[Noisy, Noisy]:
    return Noisy(), Noisy(8)


def linear(shape: object, classes: int = 2) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, classes))


class Broken(Noisy):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        raise KeyError("no column 'x'")


def broken() -> Dataset:
    return Dataset(Broken(), Noisy(8), SHAPE)


def job(name: str = "noisy", processes: int = 0, **changes: object) -> JobSpec:
    where = "tests.workers.test_loading"
    options = changes.pop("options", {})
    parts = {
        "model": {"kind": "function", "function": f"{where}:linear"},
        "data": {"kind": "function", "function": f"{where}:{name}", "options": options},
        "optimizer": {"kind": "ngd", "lr": 0.01, "damping": 0.1},
        "schedule": {"steps": 8, "evaluate_every_steps": 8},
        "batch": {"global_size": 8, "micro_size": 4},
        "loading": {"processes": processes},
    }
    return small_spec(**parts | changes)


def read(processes: int, first_step: int = 1) -> Iterator[torch.Tensor]:
    plan = Batches(40, 8, seed=3)
    requests = requests_to_train(plan, first_step=first_step, last_step=10, micro_size=4, rank=0, world_size=1)
    for micro_batch in read_ahead(Samples(Noisy(), noisy(), 3), requests, Loading(processes=processes), pins=False):
        yield micro_batch.content[0]


@pytest.mark.parametrize("processes", [1, 2])
def test_samples_do_not_depend_on_the_process_that_reads_them(processes):
    assert all(map(torch.equal, read(0), read(processes)))


def test_samples_do_not_depend_on_where_a_run_began():
    whole = list(read(0))

    assert all(map(torch.equal, whole[6:], read(0, first_step=4)))


def test_a_sample_has_other_random_numbers_in_the_next_epoch():
    x = torch.cat(list(read(0))).flatten(1)[:, 0] * 40

    first, second = (
        dict(zip(x[part].int().tolist(), x[part].tolist(), strict=True)) for part in (slice(40), slice(40, 80))
    )
    assert len(first.keys() & second.keys()) > 10
    assert not any(first[number] == second[number] for number in first.keys() & second.keys())


def test_reading_leaves_the_loop_s_random_numbers_alone():
    torch.manual_seed(0)
    random.seed(0)
    wanted = torch.rand(()), random.random()

    torch.manual_seed(0)
    random.seed(0)
    for _ in read(0):
        pass

    assert (torch.rand(()), random.random()) == wanted


@pytest.mark.parametrize(("samples", "world_size", "size"), [(10, 4, 2), (2, 4, 3), (9, 2, 100), (8, 4, 2)])
def test_every_test_sample_counts_once_and_ranks_take_equally_many_batches(samples, world_size, size):
    of_ranks = [list(requests_to_test(samples, size, rank=rank, world_size=world_size)) for rank in range(world_size)]

    counted = [index for requests in of_ranks for request in requests if request.counts for index in request.indices]
    assert sorted(counted) == list(range(samples))
    assert len({len(requests) for requests in of_ranks}) == 1


def test_job_gives_the_same_bits_at_any_number_of_reading_processes(tmp_path):
    for processes in (0, 2):
        outcome = run_rank(make_attempt(tmp_path / str(processes), job(processes=processes)))
        assert outcome.result == "succeeded", outcome.message

    none, two = (weights_at(tmp_path / processes, 8) for processes in ("0", "2"))
    assert all(torch.equal(none[name], two[name]) for name in none)


def test_pair_of_datasets_is_enough_for_a_task_that_needs_no_shape(tmp_path):
    outcome = run_rank(make_attempt(tmp_path, job("pair")))

    assert outcome.result == "failed"
    assert "task image_classification needs labelled images or rows, and the data don't say" in outcome.message


@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.parametrize(
    ("name", "options", "reason", "message"),
    [
        ("noisy", {"bad": [5]}, "InvalidData", "sample 5 (image-5.jpg) is no image; leave it out"),
        ("broken", {}, "UserCodeError", "the data failed with KeyError: \"no column 'x'\""),
        (
            "noisy",
            {"bad": list(range(40)), "skips": True},
            "InvalidData",
            "none of the 4 samples of a",
        ),
    ],
)
def test_sample_that_cannot_be_read_ends_the_job_with_its_name(tmp_path, processes, name, options, reason, message):
    outcome = run_rank(make_attempt(tmp_path, job(name, processes, options=options)))

    assert (outcome.result, outcome.reason, outcome.retryable) == ("failed", reason, False)
    assert outcome.message.startswith(message)


def test_bad_samples_that_may_be_skipped_are_left_out_and_counted(tmp_path):
    attempt = make_attempt(tmp_path, job(options={"bad": [1, 2, 3], "skips": True}, schedule={"epochs": 2}))

    outcome = run_rank(attempt)

    assert outcome.result == "succeeded", outcome.message
    assert [record.skipped_samples for record in records(spooled(attempt))][4::5] == [3, 6]


def ran(rank: int, world_size: int, attempt: AttemptDir) -> dict[str, object]:
    return run_rank(attempt).model_dump(exclude={"seconds"})


@pytest.mark.ranks
def test_sample_that_one_rank_cannot_read_ends_all_with_its_name(tmp_path):
    attempt = make_attempt(tmp_path, job(options={"bad": [5]}, resources={"workers": 2}))

    outcomes = run_ranks(2, ran, attempt)

    assert outcomes[0] == outcomes[1]
    assert (outcomes[0]["reason"], outcomes[0]["retryable"]) == ("InvalidData", False)
    assert "image-5.jpg" in outcomes[0]["message"]


@pytest.mark.ranks
def test_skipped_samples_weigh_nothing_at_any_number_of_ranks(tmp_path):
    """With samples that are missing, the gradient is still the mean over those that are there."""
    options = {"bad": [1, 2, 3, 11], "skips": True}
    sgd = {"kind": "sgd", "lr": 0.1, "momentum": 0.0}
    one = job(options=options, optimizer=sgd, batch={"global_size": 8})
    two = job(options=options, optimizer=sgd, batch={"global_size": 8, "micro_size": 2}, resources={"workers": 2})
    run_rank(make_attempt(tmp_path / "one", one))
    run_ranks(2, ran, make_attempt(tmp_path / "two", two))

    whole, cut = weights_at(tmp_path / "one", 8), weights_at(tmp_path / "two", 8)
    assert all(torch.allclose(whole[name], cut[name], rtol=1e-4, atol=1e-6) for name in whole)
