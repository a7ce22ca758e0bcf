"""Sums over ranks in two hops: each rank adds up its parts of all tensors, and sends them to the ranks that need them.

A number is rounded on the first hop alone, as on a direct way, and is added up in the same order there.
"""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ngd_dist.cost.relay import Part
from ngd_dist.distributed.comm import Communicator, Pending
from ngd_dist.distributed.exchange import begin_exchange
from ngd_dist.distributed.wire import Wire
from ngd_dist.factors.codec import Codec, Field

__all__ = ["begin_sums_of_parts", "begin_whole_sums"]

Name = TypeVar("Name", bound=Hashable)


def begin_sums_of_parts(
    comm: Communicator,
    name: str,
    parts: Sequence[Part[Name]],
    values: Mapping[Name, Tensor],
    codec: Callable[[int], Codec],
    *,
    dtype: torch.dtype,
    device: torch.device,
    kind: str,
) -> Pending[dict[Part[Name], Tensor]]:
    """Collective: the first hop. Once waited for, returns the sums of this rank's parts, in `dtype`, in rank order.

    values: flat; a missing one counts as zeros. codec: of so many numbers on their way.
    """
    here = comm.rank
    wire = Wire({part: codec(part.size) for part in parts})

    def route(source: int, target: int) -> dict[tuple[Part[Name], int], Field]:
        # This rank's own values are not rounded.
        return {} if source == target else wire.fields(part for part in parts if part.rank == target)

    def value(part: Part[Name]) -> Tensor:
        return values[part.name][part.begin : part.end]

    sent = wire.encode({part: value(part) for part in parts if part.rank != here and part.name in values})
    pending = begin_exchange(comm, name, route, sent, device, kind=kind)

    def added() -> dict[Part[Name], Tensor]:
        from_ranks = pending.wait()
        sums = {part: torch.zeros(part.size, dtype=dtype, device=device) for part in parts if part.rank == here}
        for rank, from_rank in enumerate(from_ranks):
            for part, total in sums.items():
                if rank != here:
                    total += wire.decode(part, from_rank)
                elif part.name in values:
                    total += value(part)
        return sums

    return Pending(added)


def begin_whole_sums(
    comm: Communicator,
    name: str,
    parts: Sequence[Part[Name]],
    sums: Mapping[Part[Name], Tensor],
    needed_by: Callable[[Name], Collection[int]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    kind: str,
) -> Pending[dict[Name, Tensor]]:
    """Collective: the second hop. Once waited for, returns the flat sums of the tensors that this rank needs.

    parts: all, in order; sums: those of this rank's.
    """

    def route(source: int, target: int) -> dict[Part[Name], Field]:
        sent = (part for part in parts if part.rank == source and target in needed_by(part.name))
        return {part: Field((part.size,), dtype) for part in sent}

    pending = begin_exchange(comm, name, route, sums, device, kind=kind)

    def joined() -> dict[Name, Tensor]:
        from_ranks = pending.wait()
        arrived: dict[Name, list[Tensor]] = {}
        for part in (part for part in parts if comm.rank in needed_by(part.name)):
            arrived.setdefault(part.name, []).append(from_ranks[part.rank][part])
        return {name: torch.cat(of_name) for name, of_name in arrived.items()}

    return Pending(joined)
