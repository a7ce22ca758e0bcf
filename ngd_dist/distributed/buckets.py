"""Sends the due statistics of one step to their owners while the backward pass is still running.

Buckets have one order and one content on every rank, from the due statistics alone. A bucket is launched when this rank
has all its values and the bucket before it is on its way; a statistic that was not captured goes last, as zeros.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ngd_dist.distributed.comm import Communicator, Pending
from ngd_dist.distributed.exchange import begin_exchange
from ngd_dist.distributed.wire import Wire
from ngd_dist.factors.codec import Field
from ngd_dist.statistics.statistic import Key

__all__ = ["Buckets"]

FieldKey = tuple[Key, int]  # a statistic, and which of its fields


@dataclass(slots=True)
class _Bucket:
    keys: list[Key]
    pending: Pending[list[dict[FieldKey, Tensor]]] | None = None


class Buckets:
    """Owner by owner, sums over the ranks: each rank sends a statistic to its owner, which decodes and adds them up.

    Collective: `begin`, `finish`, and also `offer`, which launches buckets that have become complete.
    sizes: the numbers of each flat statistic. exact: the dtype in which they are summed.
    limit_bytes: the most that a bucket holds, unless one statistic has more. 0: there is one bucket, and `launch` sends
        it.
    """

    def __init__(
        self,
        comm: Communicator,
        wire: Wire[Key],
        owners: Mapping[str, int],
        sizes: Mapping[Key, int],
        device: torch.device,
        *,
        exact: torch.dtype,
        limit_bytes: float,
    ) -> None:
        self._comm = comm
        self._wire = wire
        self._owners = owners
        self._sizes = sizes
        self._device = device
        self._exact = exact
        self._limit_bytes = limit_bytes
        self._overlaps = limit_bytes > 0 and comm.world_size > 1
        self._values: dict[Key, Tensor] = {}
        self._buckets: list[_Bucket] = []

    def begin(self, due: Sequence[Key]) -> None:
        """Plans a new step. A step that was never finished is sent first: another rank may be waiting for it."""
        if self._overlaps:
            self.finish()
        self._values = {}
        self._buckets = [_Bucket(keys) for keys in self._filled([*reversed(due)])]  # in the order of backward

    def offer(self, key: Key, flat: Tensor) -> None:
        """Takes this rank's value of a due statistic; the first one counts."""
        if key in self._values:
            return
        self._values[key] = flat
        if not self._overlaps:
            return
        for bucket in self._buckets:
            if bucket.pending is None:
                if not all(key in self._values for key in bucket.keys):
                    return
                self._launch(bucket)

    def launch(self) -> None:
        """Sends the buckets that are not on their way yet."""
        for bucket in self._buckets:
            if bucket.pending is None:
                self._launch(bucket)

    def finish(self) -> dict[Key, Tensor]:
        """Returns the sums of the statistics that this rank owns; nothing is under way after that."""
        self.launch()
        buckets, self._buckets = self._buckets, []
        received = [(bucket, bucket.pending.wait()) for bucket in buckets if bucket.pending is not None]
        return {
            key: self._sum(key, from_ranks)
            for bucket, from_ranks in received
            for key in bucket.keys
            if self._owners[key.layer] == self._comm.rank
        }

    def _launch(self, bucket: _Bucket) -> None:
        def route(source: int, target: int) -> dict[FieldKey, Field]:
            if source == target:  # this rank's own values are not rounded
                return {}
            return self._wire.fields(key for key in bucket.keys if self._owners[key.layer] == target)

        here = self._comm.rank
        outgoing = {k: self._values[k] for k in bucket.keys if k in self._values and self._owners[k.layer] != here}
        tensors = self._wire.encode(outgoing)
        name = f"statistics of {bucket.keys[0]}" + (f" to {bucket.keys[-1]}" if bucket.keys[1:] else "")
        bucket.pending = begin_exchange(self._comm, name, route, tensors, self._device, kind="statistics")

    def _sum(self, key: Key, from_ranks: Sequence[Mapping[FieldKey, Tensor]]) -> Tensor:
        """Returns the sum in rank order."""
        total = torch.zeros(self._sizes[key], dtype=self._exact, device=self._device)
        for rank, from_rank in enumerate(from_ranks):
            if rank != self._comm.rank:
                total += self._wire.decode(key, from_rank)
            elif key in self._values:
                total += self._values[key]
        return total

    def _filled(self, keys: Sequence[Key]) -> Iterator[list[Key]]:
        bucket: list[Key] = []
        size = 0
        for key in keys:
            nbytes = self._wire.nbytes(key)
            if bucket and 0 < self._limit_bytes < size + nbytes:
                yield bucket
                bucket, size = [], 0
            bucket.append(key)
            size += nbytes
        if bucket:
            yield bucket
