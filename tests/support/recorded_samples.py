"""Samples that note who read them: what each group of workers of an attempt on Ray has trained on, step by step."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ngd_workers.contract.rundir import AttemptDir
from ngd_workers.data import Dataset, Vectors

__all__ = ["SAMPLES", "data", "steps_of_groups"]

SAMPLES = 256


class _Points:
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(SAMPLES, 8, generator=generator)
        self.y = (self.x.sum(1) > 0).long()

    def __len__(self) -> int:
        return SAMPLES

    def batch_of(self, indices: Sequence[int], /) -> tuple[Tensor, Tensor]:
        return self.x[list(indices)], self.y[list(indices)]


class _Recorded(_Points):
    def __init__(self, attempt_dir: AttemptDir, sleep_s: float) -> None:
        super().__init__()
        groups = [int(path.name) for path in (attempt_dir.path / "nodes").glob("*")]
        folder = attempt_dir.path / "samples" / str(max(groups, default=0))
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"{os.getpid()}.jsonl"
        self._sleep_s = sleep_s

    def batch_of(self, indices: Sequence[int], /) -> tuple[Tensor, Tensor]:
        with self._file.open("a") as file:
            file.write(json.dumps(list(indices)) + "\n")
        time.sleep(self._sleep_s)
        return super().batch_of(indices)


def data(attempt_dir: str, sleep_s: float, **_: Any) -> Dataset:
    """A source for a job: 256 points of two classes. sleep_s: the time that a micro-batch takes to read."""
    return Dataset(
        train=_Recorded(AttemptDir(Path(attempt_dir)), sleep_s), test=_Points(), shape=Vectors(width=8, outputs=2)
    )


def steps_of_groups(attempt_dir: AttemptDir, resumed: Sequence[int], passes: int) -> dict[int, list[int]]:
    """Returns for each step the samples of the last group that did it.

    resumed: the step after which each group began. passes: micro-batches of a global batch.
    """
    found: dict[int, list[int]] = {}
    for group, first in enumerate(resumed, start=1):
        files = list((attempt_dir.path / "samples" / str(group)).glob("*.jsonl"))
        reads = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        each = passes // len(files)  # on each rank
        for place in range(min(len(lines) for lines in reads) // each):
            parts = [part for lines in reads for part in lines[place * each : (place + 1) * each]]
            found[first + place + 1] = [index for part in parts for index in part]
    return found
