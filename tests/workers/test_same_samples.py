"""A job that is stopped and goes on: the model sees what it would have seen, at any number of ranks."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ngd_workers.contract.rundir import AttemptDir
from ngd_workers.contract.spec import JobSpec
from ngd_workers.data import Dataset, Images, Shards
from ngd_workers.launch.attempt import run_rank
from ngd_workers.report.reporter import TICK_S
from tests.support.attempts import make_attempt, small_spec
from tests.support.data_sets import write_image_folder
from tests.support.ranks import run_ranks
from tests.workers.test_loading import Noisy

WHERE = "tests.workers.test_same_samples"
SAMPLES, GLOBAL_SIZE, STEPS = 32, 8, 12
PER_EPOCH = SAMPLES // GLOBAL_SIZE


class Seeing(nn.Linear):
    """A model that writes the samples of each training step to a file of its rank, and has the job stopped."""

    written_to = Path()
    stop_file = Path()
    stops_after = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with self.written_to.open("a") as file:
                file.write(json.dumps(x.flatten(1).tolist()) + "\n")
            Seeing.stops_after -= 1
            if Seeing.stops_after == 0:
                self.stop_file.touch()
                time.sleep(5 * TICK_S)  # the reporter looks for the file each tick
        return super().forward(x.flatten(1))


def seeing(shape: Images) -> nn.Module:
    return Seeing(shape.channels * shape.height * shape.width, shape.classes)


def noisy_in_shards() -> Dataset:
    """Returns samples of their own number, and random numbers, in eight shards."""
    return Dataset(Numbered(), Numbered(), Images(1, 2, 2, 2), shards=Shards((4,) * 8, lanes=4, window=1))


class Numbered(Noisy):
    """Images [number, noise, noise, noise]."""

    def __init__(self) -> None:
        super().__init__(SAMPLES)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, label = super().__getitem__(index)
        x[0, 0, 0] = index
        return x, label


def job(data: dict[str, Any], workers: int = 1) -> JobSpec:
    return small_spec(
        data=data,
        model={"kind": "function", "function": f"{WHERE}:seeing"},
        optimizer={"kind": "sgd", "lr": 1e-6},
        schedule={"steps": STEPS, "evaluate_every_steps": STEPS},
        batch={"global_size": GLOBAL_SIZE},
        loading={"processes": 1},
        checkpoint={"every_steps": 100},
        resources={"workers": workers},
    )


def run(rank: int, world_size: int, attempt: AttemptDir, steps: int) -> int:
    """Runs a rank of the job until it has done `steps` steps, or to its end; returns the step that it reached."""
    Seeing.written_to, Seeing.stop_file = attempt.path / f"seen-{rank}", attempt.stop
    Seeing.stops_after = steps if rank == 0 else 0
    outcome = run_rank(attempt)
    assert outcome.result == ("succeeded" if outcome.step == STEPS else "cancelled"), outcome.message
    return outcome.step


def seen(attempt: AttemptDir, world_size: int) -> list[Tensor]:
    """Returns the global batch of each step."""
    of_ranks = [(attempt.path / f"seen-{rank}").read_text().splitlines() for rank in range(world_size)]
    return [torch.cat([torch.tensor(json.loads(line)) for line in lines]) for lines in zip(*of_ranks, strict=True)]


@pytest.mark.slow
def test_resumed_job_sees_the_pixels_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    data = {"kind": "image_folder", "directory": str(write_image_folder(tmp_path / "pictures")), "images": {"size": 8}}
    whole, first, second = (
        make_attempt(tmp_path / name, job(data), number) for name, number in (("whole", 1), ("cut", 1), ("cut", 2))
    )

    run(0, 1, whole, 0)
    stopped = run(0, 1, first, PER_EPOCH + 2)
    run(0, 1, second, 0)

    assert PER_EPOCH < stopped < 2 * PER_EPOCH
    assert torch.equal(torch.stack(seen(first, 1) + seen(second, 1)), torch.stack(seen(whole, 1)))


@pytest.mark.slow
@pytest.mark.ranks
def test_every_sample_counts_once_an_epoch_over_two_changes_of_the_number_of_ranks(tmp_path: Path) -> None:
    data = {"kind": "function", "function": f"{WHERE}:noisy_in_shards"}
    whole = make_attempt(tmp_path / "whole", job(data))
    run(0, 1, whole, 0)

    batches: list[Tensor] = []
    reached = []
    for number, (workers, steps) in enumerate(((2, 2), (1, 4), (4, 0)), start=1):
        attempt = make_attempt(tmp_path / "cut", job(data, workers), number)
        reached.append(run_ranks(workers, run, attempt, steps)[0])
        batches += seen(attempt, workers)

    assert 0 < reached[0] < PER_EPOCH < reached[1] < 2 * PER_EPOCH
    assert reached[2] == STEPS
    assert torch.equal(torch.stack(batches), torch.stack(seen(whole, 1)))
    for epoch in torch.stack(batches).split(PER_EPOCH):
        assert epoch[..., 0].flatten().int().sort().values.tolist() == list(range(SAMPLES))
