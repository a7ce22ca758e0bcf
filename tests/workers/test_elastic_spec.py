"""The sizes of an elastic job, and that job at one of them."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ngd_workers.contract.spec import Job, JobSpec, LoopSpec
from ngd_workers.contract.spec_problems import explain
from ngd_workers.train.batches import Batches
from tests.support.attempts import small_spec


def elastic(least: int, most: int, global_size: int = 64, micro_size: int | None = None, **more: Any) -> JobSpec:
    batch = {"global_size": global_size, "micro_size": micro_size}
    return small_spec(resources={"min_workers": least, "max_workers": most} | more, batch=batch)


def own_loop(least: int, most: int) -> LoopSpec:
    loop = {"function": "mine:train"}
    return LoopSpec.model_validate(
        {"name": "own", "train": loop, "resources": {"min_workers": least, "max_workers": most}}
    )


def message(call: Any) -> str:
    """Returns what a user reads of the one problem of a spec."""
    with pytest.raises(ValidationError) as error:
        call()
    (problem,) = explain(error.value, JobSpec)
    return problem.detail


@pytest.mark.parametrize(
    ("least", "most", "global_size", "micro_size", "sizes"),
    [
        (1, 4, 64, None, (1, 2, 4)),
        (2, 8, 64, None, (2, 4, 8)),
        (2, 6, 60, None, (2, 3, 6)),  # at 4 and 5 a share is not made of micro-batches of 10
        (2, 6, 60, 5, (2, 3, 4, 6)),
        (1, 2, 32, 16, (1, 2)),
    ],
)
def test_sizes_divide_the_batch_into_whole_micro_batches(
    least: int, most: int, global_size: int, micro_size: int | None, sizes: tuple[int, ...]
) -> None:
    assert elastic(least, most, global_size, micro_size).sizes == sizes


def test_fixed_job_has_one_size() -> None:
    assert small_spec(resources={"workers": 2}).sizes == (2,)


def test_own_loop_takes_any_size_in_the_range() -> None:
    assert own_loop(2, 5).sizes == (2, 3, 4, 5)
    assert own_loop(2, 5).at(3).resources.workers == 3


@given(data=st.data(), most=st.integers(2, 24), passes=st.integers(1, 4), micro=st.integers(1, 8))
def test_every_size_reads_the_same_micro_batches(data: st.DataObject, most: int, passes: int, micro: int) -> None:
    size, given_size = most * passes * micro, data.draw(st.sampled_from([None, micro]))
    *smaller, _ = elastic(1, most, size, given_size).sizes
    least = data.draw(st.integers(1, max(smaller)))  # below, there would be no size but the largest
    job = elastic(least, most, size, given_size)
    batches = Batches(2 * size, size, seed=1)
    assert all(least <= workers <= most for workers in job.sizes)
    assert job.sizes[-1] == most

    def read_by(workers: int) -> list[list[int]]:
        fixed = job.at(workers)
        assert fixed.batch.global_size == size
        assert fixed.micro_batches * fixed.micro_size * workers == size
        shares = [batches.share(1, rank, workers) for rank in range(workers)]
        return [part.tolist() for share in shares for part in share.split(fixed.micro_size)]

    first, *others = [read_by(workers) for workers in job.sizes]
    assert all(other == first for other in others)


def test_job_at_a_size_is_fixed_and_stays_so() -> None:
    fixed = elastic(1, 4).at(2)

    assert not fixed.resources.is_elastic
    assert (fixed.resources.workers, fixed.micro_size, fixed.micro_batches) == (2, 16, 2)
    assert fixed.at(2) is fixed
    assert JobSpec.model_validate_json(elastic(1, 4).model_dump_json()).sizes == (1, 2, 4)


def test_fixed_job_at_another_size_takes_its_whole_share_in_one_pass_as_before() -> None:
    assert small_spec(resources={"workers": 4}).at(2).micro_size == 32


@pytest.mark.parametrize(
    ("job", "size", "words"),
    [
        (elastic(1, 4), 3, "it runs with 1, 2 or 4 workers, got 3; start as many"),
        (own_loop(2, 5), 6, "it runs with 2 to 5 workers, got 6; start as many"),
        (elastic(1, 2), 8, "it runs with 1 or 2 workers, got 8; start as many"),
    ],
)
def test_size_that_is_not_allowed_is_refused_with_those_that_are(job: Job, size: int, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        job.at(size)


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        (
            {"min_workers": 1},
            "resources: min_workers is 1 and max_workers is left out; give both, or workers alone",
        ),
        (
            {"max_workers": 2},
            "resources: max_workers is 2 and min_workers is left out; give both, or workers alone",
        ),
        (
            {"min_workers": 2, "max_workers": 2},
            "resources: min_workers must be < max_workers (2), got 2; for a number that stays give workers alone",
        ),
        (
            {"min_workers": 1, "max_workers": 4, "workers": 2},
            "resources: workers must be max_workers (4) in an elastic job, got 2; leave it out, or give 4",
        ),
        ({"min_workers": 0, "max_workers": 2}, "resources.min_workers must be >= 1, got 0"),
        ({"min_workers": 1, "max_workers": 5000}, "resources.max_workers must be <= 4096, got 5000"),
        (
            {"min_workers": 1, "max_workers": 3},
            "batch.global_size must be a multiple of resources.max_workers (3), got 64; the nearest are 63 and 66",
        ),
        (
            {"min_workers": 3, "max_workers": 4},
            "resources.min_workers 3 and max_workers 4 leave no number of workers but 4 by which batch.global_size "
            "(64) can be divided into micro-batches of 16; lower min_workers to 2, or give workers alone",
        ),
    ],
)
def test_range_that_means_nothing_is_refused_with_the_remedy(resources: dict[str, int], words: str) -> None:
    assert message(lambda: small_spec(resources=resources)) == words


def test_micro_size_has_to_divide_the_share_at_the_largest_size() -> None:
    assert message(lambda: elastic(1, 4, 64, 32)) == (
        "batch.micro_size must divide a worker's share, 16 (= batch.global_size 64 / resources.max_workers 4), got 32"
    )


def test_remedies_hold() -> None:
    assert elastic(2, 4).sizes == (2, 4)
    assert elastic(1, 4, workers=4).sizes == (1, 2, 4)
