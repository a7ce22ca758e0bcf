"""Chooses the samples of each global batch, and the share of each rank.

The choice is a pure function of (seed, step): no state is saved, and any number of ranks sees the same global batches.
"""

import contextlib
import hashlib
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ngd_workers.contract.errors import SpecError

__all__ = ["Batches", "seed_everything", "seed_step"]


@dataclass(slots=True)
class Batches:
    """Global batches of one epoch after another; the samples after an epoch's last full batch are dropped."""

    num_samples: int
    global_size: int
    seed: int
    _order: tuple[int, Tensor] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.num_samples < self.global_size:
            raise SpecError(
                f"batch.global_size must be at most the number of training samples, {self.num_samples}, "
                f"got {self.global_size}; lower it"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.global_size

    def share(self, step: int, rank: int, world_size: int) -> Tensor:
        """Returns the indices of the rank's share of the global batch of `step`, which counts from 1."""
        epoch, batch = divmod(step - 1, self.steps_per_epoch)
        size = self.global_size // world_size
        start = batch * self.global_size + rank * size
        return self._permutation(epoch)[start : start + size]

    def _permutation(self, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
            self._order = epoch, torch.randperm(self.num_samples, generator=generator)
        return self._order[1]


def seed_everything(seed: int) -> None:
    """Seeds torch, numpy and Python, for a model's first weights and for users' functions."""
    torch.manual_seed(seed)
    random.seed(seed)
    with contextlib.suppress(ImportError):  # the loop itself needs no numpy
        import numpy as np

        np.random.seed(seed)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds torch for one step of one rank (dropout), so that a resumed run draws the same numbers."""
    torch.manual_seed(_mix(seed, step, rank))


def _mix(*numbers: int) -> int:
    """Returns a seed below 2**63 in which every bit of every number counts."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1
