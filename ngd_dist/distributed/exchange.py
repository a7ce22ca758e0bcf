"""One exchange of tensors between all ranks, in which each pair of ranks has its own list of them."""

from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from ngd_dist.cost.relay import cut, relays
from ngd_dist.distributed.comm import Communicator, Pending
from ngd_dist.distributed.packed_bytes import pack_bytes, packed_nbytes, unpack_bytes
from ngd_dist.factors.codec import Field

__all__ = ["Route", "begin_exchange", "begin_spread"]

TensorKey = TypeVar("TensorKey", bound=Hashable)
# The fields that the first rank sends to the second. A pure function of shared numbers: both sides call it.
Route = Callable[[int, int], Mapping[TensorKey, Field]]


def begin_exchange(
    comm: Communicator,
    name: str,
    route: Route[TensorKey],
    tensors: Mapping[TensorKey, Tensor],
    device: torch.device,
    *,
    kind: str,
) -> Pending[list[dict[TensorKey, Tensor]]]:
    """Collective. Sends `tensors` along the route, zeros for missing ones.

    Once waited for, returns the tensors of each rank in rank order: views of one buffer. Tensors that a rank sends to
    itself are returned as they are.
    """
    zero = torch.zeros((), device=device)
    here, all_ranks = comm.rank, range(comm.world_size)
    outgoing = [route(here, r) for r in all_ranks]
    incoming = [route(r, here) for r in all_ranks]
    kept = {key: tensors[key] for key in outgoing[here] if key in tensors}
    nothing = torch.empty(0, dtype=torch.uint8, device=device)
    packed = [
        nothing if r == here else pack_bytes([*fields.values()], [tensors.get(i, zero) for i in fields], device)
        for r, fields in enumerate(outgoing)
    ]
    pending = comm.begin_exchange(name, packed, [packed_nbytes([*fields.values()]) for fields in incoming], kind=kind)

    def unpack() -> list[dict[TensorKey, Tensor]]:
        received = zip(incoming, pending.wait(), strict=True)
        return [
            kept if r == here else dict(zip(fields, unpack_bytes([*fields.values()], buffer), strict=True))
            for r, (fields, buffer) in enumerate(received)
        ]

    return Pending(unpack)


def begin_spread(
    comm: Communicator,
    name: str,
    fields_of: Callable[[int], Mapping[TensorKey, Field]],
    tensors: Mapping[TensorKey, Tensor],
    device: torch.device,
    *,
    kind: str,
) -> Pending[list[dict[TensorKey, Tensor]]]:
    """Collective. As `begin_exchange`, but each rank sends the same tensors, `fields_of` it, to every other.

    They go in two hops if one rank has much more than the others: it would send all of that to each of them. The second
    hop begins when the result is waited for.
    """
    fields = [fields_of(rank) for rank in range(comm.world_size)]
    sizes = [packed_nbytes([*of_rank.values()]) for of_rank in fields]
    if not relays(sizes, comm.world_size):
        return begin_exchange(comm, name, lambda source, _: fields[source], tensors, device, kind=kind)
    zero = torch.zeros((), device=device)
    own = fields[comm.rank]
    packed = pack_bytes([*own.values()], [tensors.get(key, zero) for key in own], device)
    # Of each message a rank has one part at most.
    from_here, to_here, lengths = dict[int, slice](), dict[int, int](), [0] * comm.world_size
    for part in cut(dict(enumerate(sizes)), comm.world_size):
        lengths[part.rank] += part.size
        if part.name == comm.rank:
            from_here[part.rank] = slice(part.begin, part.end)
        if part.rank == comm.rank:
            to_here[part.name] = part.size
    all_ranks = range(comm.world_size)
    pending = comm.begin_exchange(
        f"{name}, first hop",
        [packed[from_here.get(rank, slice(0, 0))] for rank in all_ranks],
        [to_here.get(rank, 0) for rank in all_ranks],
        kind=kind,
    )

    def unpack() -> list[dict[TensorKey, Tensor]]:
        part = torch.cat(pending.wait())
        whole = torch.cat(comm.begin_exchange(f"{name}, second hop", [part] * len(lengths), lengths, kind=kind).wait())
        return [
            dict(zip(of_rank, unpack_bytes([*of_rank.values()], message), strict=True))
            for of_rank, message in zip(fields, whole.split(sizes), strict=True)
        ]

    return Pending(unpack)
