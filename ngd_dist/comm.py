"""The only caller of torch.distributed: named collectives that count what they send.

A collective here must be called by every rank of the group, with the same names in the same order and the same
shapes. The group's timeout bounds each of them; an error names the collective and the rank.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ngd_dist.errors import CollectiveError

__all__ = ["Communicator"]


class Communicator:
    """A process group, or one process without any. Tensors must be contiguous and on the group's device."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        joined = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank(group) if joined else 0
        self.world_size: int = dist.get_world_size(group) if joined else 1
        self._sent: Counter[str] = Counter()

    def all_reduce(self, name: str, tensor: Tensor, *, kind: str = "control") -> None:
        """Collective. Replaces the tensor, on every rank, by its sum over the ranks."""
        if self.world_size == 1:
            return
        self._count(kind, 2 * tensor.nbytes)
        with self._named(name):
            dist.all_reduce(tensor, group=self._group)

    def reduce_scatter(self, name: str, parts: Tensor, *, kind: str) -> Tensor:
        """Collective. Returns this rank's part of the sum; `parts` holds one part of equal size per rank, in order."""
        if self.world_size == 1:
            return parts
        self._count(kind, parts.nbytes)
        own = parts.new_empty(parts.numel() // self.world_size)
        with self._named(name):
            dist.reduce_scatter_tensor(own, parts, group=self._group)
        return own

    def all_gather(self, name: str, part: Tensor, *, kind: str) -> Tensor:
        """Collective. Returns the parts of all ranks, in order; the parts are of equal size."""
        if self.world_size == 1:
            return part
        self._count(kind, part.nbytes * self.world_size)
        parts = part.new_empty(part.numel() * self.world_size)
        with self._named(name):
            dist.all_gather_into_tensor(parts, part, group=self._group)
        return parts

    def all_gather_object(self, name: str, value: Any) -> list[Any]:
        """Collective. Returns every rank's value, pickled on the way: for checkpoints, not for steps."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self._named(name):
            dist.all_gather_object(values, value, group=self._group)
        return values

    def broadcast(self, name: str, tensor: Tensor, *, src: int = 0) -> None:
        """Collective. Replaces the tensor, on every rank, by that of the rank `src` of the group."""
        if self.world_size == 1:
            return
        with self._named(name):
            dist.broadcast(tensor, group=self._group, group_src=src)

    def barrier(self, name: str) -> None:
        """Collective. Returns when every rank has called it."""
        arrived = torch.zeros(1, device=self.device)
        self.all_reduce(name, arrived)
        arrived.item()  # NCCL only queues: reading the result waits for it

    @property
    def device(self) -> torch.device:
        """Where tensors must lie: the current CUDA device under NCCL, else the CPU."""
        if self.world_size > 1 and dist.get_backend(self._group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def take_sent(self) -> dict[str, int]:
        """Returns the bytes that this rank has sent since the last call, by kind."""
        sent, self._sent = dict(self._sent), Counter()
        return sent

    def _count(self, kind: str, nbytes: int) -> None:
        # A ring sends (P - 1) / P of a buffer for each of reduce-scatter and all-gather; all-reduce is both.
        self._sent[kind] += nbytes * (self.world_size - 1) // self.world_size

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise CollectiveError(
                f"collective {name!r} failed on rank {self.rank} of {self.world_size}: {error}"
            ) from error
