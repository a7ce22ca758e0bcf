"""Sends the due statistics of one step to their owners while the backward pass is still running.

Buckets have one order and one content on every rank, from the due statistics alone. A bucket is launched when this rank
has all its values and the bucket before it is on its way; a statistic that was not captured goes last, as zeros. A
bucket that would flood an owner goes in two hops, of which the second begins in `finish`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ngd_dist.cost.relay import filled, relays
from ngd_dist.distributed.comm import Communicator, Pending
from ngd_dist.distributed.exchange import begin_exchange
from ngd_dist.distributed.relay import begin_sums
from ngd_dist.distributed.wire import Wire
from ngd_dist.factors.codec import AsItIs, Codec, Field, OverPowerOfTwo
from ngd_dist.statistics.statistic import Key

__all__ = ["Buckets"]

FieldKey = tuple[Key, int]  # a statistic, and which of its fields
Sums = dict[Key, Tensor]


@dataclass(slots=True)
class _Bucket:
    """is_relayed: whether it goes in two hops. on: once launched, waits for the first hop and begins the second."""

    keys: list[Key]
    is_relayed: bool
    on: Callable[[], Pending[Sums]] | None = None


class Buckets:
    """Sums over the ranks of each statistic, decoded: on its owner, and after two hops on all ranks that invert it.

    Collective: `begin`, `finish`, and also `offer`, which launches buckets that have become complete.
    inverters: by layer, the owner first. sizes: the numbers of each flat statistic. exact: the dtype in which they are
    summed; rounded: that on the way. limit_bytes: the most that a bucket holds, unless one statistic has more. 0: there
    is one bucket, and `launch` sends it.
    """

    def __init__(
        self,
        comm: Communicator,
        wire: Wire[Key],
        inverters: Mapping[str, Sequence[int]],
        sizes: Mapping[Key, int],
        device: torch.device,
        *,
        exact: torch.dtype,
        rounded: torch.dtype,
        limit_bytes: float,
    ) -> None:
        self._comm = comm
        self._wire = wire
        self._inverters = inverters
        self._sizes = sizes
        self._device = device
        self._exact = exact
        self._rounded = rounded
        self._limit_bytes = limit_bytes
        self._overlaps = limit_bytes > 0 and comm.world_size > 1
        self._values: dict[Key, Tensor] = {}
        self._buckets: list[_Bucket] = []
        self.relayed: frozenset[Key] = frozenset()  # those of the step

    def begin(self, due: Sequence[Key]) -> None:
        """Plans a new step. A step that was never finished is sent first: another rank may be waiting for it."""
        if self._overlaps:
            self.finish()
        self._values = {}
        sizes = {key: self._wire.nbytes(key) for key in reversed(due)}  # in the order of backward
        self._buckets = [_Bucket(keys, self._relays(keys)) for keys in filled(sizes, self._limit_bytes)]
        self.relayed = frozenset(key for bucket in self._buckets if bucket.is_relayed for key in bucket.keys)

    def offer(self, key: Key, flat: Tensor) -> None:
        """Takes this rank's value of a due statistic; the first one counts."""
        if key in self._values:
            return
        self._values[key] = flat
        if not self._overlaps:
            return
        for bucket in self._buckets:
            if bucket.on is None:
                if not all(key in self._values for key in bucket.keys):
                    return
                self._launch(bucket)

    def launch(self) -> None:
        """Sends the buckets that are not on their way yet."""
        for bucket in self._buckets:
            if bucket.on is None:
                self._launch(bucket)

    def finish(self) -> Sums:
        """Returns the sums of the statistics that this rank needs; nothing is under way after that."""
        self.launch()
        buckets, self._buckets = self._buckets, []
        pending = [bucket.on() for bucket in buckets if bucket.on is not None]
        return {key: total for of_bucket in pending for key, total in of_bucket.wait().items()}

    def _owner(self, key: Key) -> int:
        return self._inverters[key.layer][0]

    def _relays(self, keys: Iterable[Key]) -> bool:
        owned = [0] * self._comm.world_size
        for key in keys:
            owned[self._owner(key)] += self._wire.nbytes(key)
        return relays(owned, self._comm.world_size)

    def _launch(self, bucket: _Bucket) -> None:
        name = f"statistics of {bucket.keys[0]}" + (f" to {bucket.keys[-1]}" if bucket.keys[1:] else "")
        bucket.on = self._in_two_hops(name, bucket.keys) if bucket.is_relayed else self._directly(name, bucket.keys)

    def _directly(self, name: str, keys: Sequence[Key]) -> Callable[[], Pending[Sums]]:
        def route(source: int, target: int) -> dict[FieldKey, Field]:
            if source == target:  # this rank's own values are not rounded
                return {}
            return self._wire.fields(key for key in keys if self._owner(key) == target)

        here = self._comm.rank
        outgoing = {key: self._values[key] for key in keys if key in self._values and self._owner(key) != here}
        sent = self._wire.encode(outgoing)
        pending = begin_exchange(self._comm, name, route, sent, self._device, kind="statistics")

        def added() -> Sums:
            from_ranks = pending.wait()
            return {key: self._sum(key, from_ranks) for key in keys if self._owner(key) == here}

        return lambda: Pending(added)

    def _in_two_hops(self, name: str, keys: Sequence[Key]) -> Callable[[], Pending[Sums]]:
        return begin_sums(
            self._comm,
            name,
            {key: self._sizes[key] for key in keys},
            self._values,
            self._codec_of_part,
            lambda key: self._inverters[key.layer],
            dtype=self._exact,
            device=self._device,
            kind="statistics",
        )

    def _codec_of_part(self, key: Key, numbers: int) -> Codec:
        # A part does not know the diagonal by whose roots a whole matrix in 16 bits is scaled.
        if any(field.dtype.itemsize == 2 for field in self._wire.fields([key]).values()):
            return OverPowerOfTwo(numbers, self._exact, self._rounded)
        return AsItIs((numbers,), self._exact)

    def _sum(self, key: Key, from_ranks: Sequence[Mapping[FieldKey, Tensor]]) -> Tensor:
        """Returns the sum in rank order."""
        total = torch.zeros(self._sizes[key], dtype=self._exact, device=self._device)
        for rank, from_rank in enumerate(from_ranks):
            if rank != self._comm.rank:
                total += self._wire.decode(key, from_rank)
            elif key in self._values:
                total += self._values[key]
        return total
