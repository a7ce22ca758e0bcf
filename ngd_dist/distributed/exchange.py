"""One exchange of tensors between all ranks, in which each pair of ranks has its own list of them."""

from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from ngd_dist.distributed.comm import Communicator, Pending
from ngd_dist.distributed.packed_bytes import pack_bytes, packed_nbytes, unpack_bytes
from ngd_dist.factors.codec import Field

__all__ = ["Route", "begin_exchange"]

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
