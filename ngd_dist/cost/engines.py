"""The engines that may drive a model, as far as their cost goes: what each shards, sends and gathers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ngd_dist.cost.relay import cut

__all__ = ["ENGINES", "EngineCost", "EngineName", "Piece", "pieces"]

EngineName = Literal["bare", "ddp", "fsdp", "zero0", "zero1", "zero2", "zero3"]
Piece = tuple[int, int]  # a rank, and the numbers of a tensor that it has


@dataclass(frozen=True, slots=True)
class EngineCost:
    """An engine. averages: whether it averages gradients itself.

    shards_*: whether each rank has one part of them. sums: the times that all weights' size crosses the network for the
    averages, n (P - 1) / P each: 2 for an all-reduce, 1 for a reduce-scatter. gathers: the all-gathers of the weights
    in a step, gathers_each: those in each micro-batch. cut: whether tensors lie whole on each rank, each cut in P, or
    end to end with the sequence cut in P. Source: ZeRO (Rajbhandari et al., 2020), section 7.
    """

    averages: bool = True
    shards_weights: bool = False
    shards_gradients: bool = False
    shards_state: bool = False
    sums: int = 2
    gathers: int = 0
    gathers_each: int = 0
    cut: Literal["whole", "each", "joined"] = "whole"

    @property
    def is_sharded(self) -> bool:
        """Whether a rank has only pieces of the averaged gradients."""
        return self.cut != "whole"


_SHARDS_ALL = EngineCost(
    shards_weights=True, shards_gradients=True, shards_state=True, sums=1, gathers_each=2, cut="each"
)
ENGINES: Mapping[EngineName, EngineCost] = {
    "bare": EngineCost(averages=False, sums=0),
    "ddp": EngineCost(),
    "fsdp": _SHARDS_ALL,
    "zero0": EngineCost(),
    "zero1": EngineCost(shards_state=True, sums=1, gathers=1, cut="joined"),
    "zero2": EngineCost(shards_state=True, shards_gradients=True, sums=1, gathers=1, cut="joined"),
    "zero3": _SHARDS_ALL,
}


def pieces(engine: EngineCost, sizes: Sequence[int], world_size: int) -> list[list[Piece]] | None:
    """Returns for each tensor the pieces of the ranks that have any; None if each rank has 1 / P of each, or the whole.

    sizes: the numbers of each tensor, in the order of the model.
    """
    if engine.cut != "joined":
        return None
    of_tensors: list[list[Piece]] = [[] for _ in sizes]
    for tensor, rank, begin, end in cut(dict(enumerate(sizes)), world_size):
        of_tensors[tensor].append((rank, end - begin))
    return of_tensors
