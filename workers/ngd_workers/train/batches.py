"""Chooses the samples of each global batch, and the share of each rank.

The choice is a pure function of (seed, epoch, step): no state is saved, and any number of ranks, of micro-batches and
of loader processes sees the same global batches.

Samples in shards. To read whole stretches of few files, an epoch's shuffled list of shards is cut into equal *lanes*.
In a lane, samples are shuffled within windows of a few shards. A global batch takes as many samples of each lane, lane
by lane, so that a rank, whose share is a range of the batch, reads some lanes' shards alone.
"""

import contextlib
import hashlib
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ngd_workers.contract.errors import SpecError
from ngd_workers.data import Shards

__all__ = ["Batches", "mix", "seed_everything", "seed_step"]


@dataclass(slots=True)
class Batches:
    """Global batches of one epoch after another; the samples after an epoch's last full batch are dropped."""

    num_samples: int
    global_size: int
    seed: int
    shards: Shards | None = None
    _lanes: int = field(default=1, init=False)
    _order: tuple[int, Tensor] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.num_samples < self.global_size:
            raise SpecError(
                f"batch.global_size must be at most the number of training samples, {self.num_samples}, "
                f"got {self.global_size}; lower it"
            )
        if self.shards is None:
            return
        divisors = [n for n in range(1, len(self.shards.sizes) + 1) if self.global_size % n == 0]
        self._lanes = self.shards.lanes or divisors[-1]
        if self.global_size % self._lanes:
            raise SpecError(
                f"data.lanes must divide batch.global_size ({self.global_size}), got {self._lanes}; leave it out, or "
                f"take {max(n for n in range(1, self._lanes) if self.global_size % n == 0)}"
            )
        if self.steps_per_epoch == 0:
            raise SpecError(
                f"data.lanes {self._lanes} leaves {self.num_samples // self._lanes} samples for a lane, fewer than the "
                f"{self.global_size // self._lanes} that a global batch takes of it; lower data.lanes"
            )

    @property
    def steps_per_epoch(self) -> int:
        return (self.num_samples // self._lanes) // (self.global_size // self._lanes)

    def epoch_of(self, step: int) -> int:
        """Returns the epoch of `step`: from 0; steps count from 1."""
        return (step - 1) // self.steps_per_epoch

    def share(self, step: int, rank: int, world_size: int) -> Tensor:
        """Returns the indices of the rank's share of the global batch of `step`, which counts from 1."""
        epoch, batch = divmod(step - 1, self.steps_per_epoch)
        size = self.global_size // world_size
        return self._batches(epoch)[batch, rank * size : (rank + 1) * size]

    def _batches(self, epoch: int) -> Tensor:
        """Returns the epoch's global batches, [steps, global_size]."""
        if self._order is None or self._order[0] != epoch:
            steps, size = self.steps_per_epoch, self.global_size
            if self.shards is None:
                order = _shuffled(self.num_samples, self.seed, epoch)[: steps * size].view(steps, size)
            else:
                per_lane = size // self._lanes
                lanes = [lane[: steps * per_lane].view(steps, per_lane) for lane in self._of_lanes(self.shards, epoch)]
                order = torch.cat(lanes, dim=1)
            self._order = epoch, order
        return self._order[1]

    def _of_lanes(self, shards: Shards, epoch: int) -> list[Tensor]:
        """Returns the samples of each lane, in order."""
        starts = [0, *torch.tensor(shards.sizes).cumsum(0).tolist()]
        order = _shuffled(len(shards.sizes), self.seed, epoch).tolist()
        samples = torch.cat([torch.arange(starts[shard], starts[shard + 1]) for shard in order])
        window = max(1, shards.window * self.num_samples // len(shards.sizes))
        cuts = [self.num_samples * lane // self._lanes for lane in range(self._lanes + 1)]
        lanes = []
        for lane in range(self._lanes):
            generator = torch.Generator().manual_seed(mix(self.seed, epoch, lane))
            windows = samples[cuts[lane] : cuts[lane + 1]].split(window)
            lanes.append(torch.cat([part[torch.randperm(len(part), generator=generator)] for part in windows]))
        return lanes


def seed_everything(seed: int) -> None:
    """Seeds torch, numpy and Python, for a model's first weights and for users' functions."""
    torch.manual_seed(seed)
    random.seed(seed)
    with contextlib.suppress(ImportError):  # the loop itself needs no numpy
        import numpy as np

        np.random.seed(seed % 2**32)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds torch for one step of one rank (dropout), so that a resumed run draws the same numbers."""
    torch.manual_seed(mix(seed, step, rank))


def mix(*numbers: int) -> int:
    """Returns a seed below 2**63 in which every bit of every number counts."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def _shuffled(length: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(mix(seed, epoch)))
