"""Sums over ranks in two hops: each rank adds up its parts of all tensors, and sends them to the ranks that need them.

A number is rounded on the first hop alone, if it is rounded on a direct way, and is added up in the same order there.
"""

from collections.abc import Callable, Collection, Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from ngd_dist.cost.relay import Part, cut
from ngd_dist.distributed.comm import Communicator, Pending
from ngd_dist.distributed.exchange import begin_exchange
from ngd_dist.distributed.wire import Wire
from ngd_dist.factors.codec import Codec, Field

__all__ = ["begin_sums"]

Name = TypeVar("Name", bound=Hashable)


def begin_sums(
    comm: Communicator,
    name: str,
    sizes: Mapping[Name, int],
    values: Mapping[Name, Tensor],
    codec: Callable[[Name, int], Codec],
    needed_by: Callable[[Name], Collection[int]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    kind: str,
) -> Callable[[], Pending[dict[Name, Tensor]]]:
    """Collective: the first hop. Returns a call that waits for it and begins the second one, collective as well.

    The second hop gives each rank the flat sums of the tensors that it needs, in `dtype`, added in rank order.
    values: flat; a missing one counts as zeros. codec: of so many numbers of a tensor, on the first hop.
    """
    here, parts = comm.rank, cut(sizes, comm.world_size)
    wire = Wire({part: codec(part.name, part.size) for part in parts})
    of_rank: list[list[Part[Name]]] = [[] for _ in range(comm.world_size)]
    for part in parts:
        of_rank[part.rank].append(part)
    needed = {name: frozenset(needed_by(name)) for name in sizes}

    def to_adders(source: int, target: int) -> dict[tuple[Part[Name], int], Field]:
        # This rank's own values are not rounded.
        return {} if source == target else wire.fields(of_rank[target])

    def to_those_in_need(source: int, target: int) -> dict[Part[Name], Field]:
        return {part: Field((part.size,), dtype) for part in of_rank[source] if target in needed[part.name]}

    def value(part: Part[Name]) -> Tensor:
        return values[part.name][part.begin : part.end]

    sent = wire.encode({part: value(part) for part in parts if part.rank != here and part.name in values})
    first = begin_exchange(comm, f"{name}, first hop", to_adders, sent, device, kind=kind)

    def begin_second() -> Pending[dict[Name, Tensor]]:
        from_ranks = first.wait()
        sums = {part: torch.zeros(part.size, dtype=dtype, device=device) for part in of_rank[here]}
        for rank, from_rank in enumerate(from_ranks):
            for part, total in sums.items():
                if rank != here:
                    total += wire.decode(part, from_rank)
                elif part.name in values:
                    total += value(part)
        second = begin_exchange(comm, f"{name}, second hop", to_those_in_need, sums, device, kind=kind)
        return Pending(lambda: joined(second.wait()))

    def joined(from_ranks: list[dict[Part[Name], Tensor]]) -> dict[Name, Tensor]:
        arrived: dict[Name, list[Tensor]] = {}
        for part in (part for part in parts if here in needed[part.name]):
            arrived.setdefault(part.name, []).append(from_ranks[part.rank][part])
        return {name: torch.cat(of_name) for name, of_name in arrived.items()}

    return begin_second
