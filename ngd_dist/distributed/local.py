"""Directions of layers of which each rank has a cache of its own, made of its own samples."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from ngd_dist.distributed.base import flatten, split_like
from ngd_dist.distributed.comm import Communicator

__all__ = ["mean_directions"]


def mean_directions(
    comm: Communicator, directions: Mapping[str, Tensor], lacking: Collection[str], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Collective. Returns the means over ranks of the directions that each made of the same gradient, in `dtype`.

    lacking: the layers of which this rank has no cache; their directions here are the gradient. A mean is over the
    ranks that have a cache; if none has, it is the gradient. All ranks get the same bits.
    """
    if not directions or comm.world_size == 1:
        return dict(directions)
    zero = next(iter(directions.values())).new_zeros(())
    counts = torch.stack([zero if name in lacking else zero + 1 for name in directions])
    made = [torch.zeros_like(direction) if name in lacking else direction for name, direction in directions.items()]
    buffer = flatten([counts, *made], dtype)
    comm.all_reduce("local directions", buffer, kind="directions")
    counts, *sums = split_like(buffer, [counts, *made])
    return {
        name: torch.where(count > 0, total / count.clamp(min=1), directions[name].to(dtype))
        for name, count, total in zip(directions, counts, sums, strict=True)
    }
