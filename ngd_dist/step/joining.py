"""Momentum and moments of pieces as whole tensors, and back: a state saved under one engine loads under any other."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ngd_dist.errors import CheckpointError

__all__ = ["cut", "join", "join_pieces"]

MOMENTUM, STEP = "momentum_buffer", "step"
State = dict[str, Any]


def join_pieces(parts: Sequence[Mapping[str, Any]]) -> State:
    """Returns the state that the parts of all ranks make up, with whole tensors. Layers are not joined here.

    parts: optimizer states, each with its own pieces of torch's "momentum_buffer" and of the fallback's moments, and
        in `["ngd"]["ranges"]` by name of each parameter: its place among all, its shape, and the piece's beginning.
    """
    tables = [part["ngd"]["ranges"] for part in parts]
    state: dict[int, State] = {}
    fallback: dict[str, State] | None = None if parts[0]["ngd"]["fallback"] is None else {}
    for name, (place, shape, _) in tables[0].items():
        starts = [table[name][2] for table in tables]
        momentum = [part["state"].get(place, {}).get(MOMENTUM) for part in parts]
        if (whole := join(momentum, starts, shape)) is not None:
            state[place] = {MOMENTUM: whole}
        if fallback is None:
            continue
        moments = [part["ngd"]["fallback"].get(name, {}) for part in parts]
        keys = {key for of_rank in moments for key in of_rank}
        if any(name in part["ngd"]["fallback"] for part in parts):
            fallback[name] = {
                key: next(of_rank[key] for of_rank in moments if key in of_rank)
                if key == STEP
                else join([of_rank.get(key) for of_rank in moments], starts, shape)
                for key in sorted(keys)
            }
    ngd = {key: value for key, value in parts[0]["ngd"].items() if key != "ranges"} | {"fallback": fallback}
    return dict(parts[0]) | {"state": state, "ngd": ngd}


def cut(whole: Tensor, start: int, length: int, name: str, shape: torch.Size) -> Tensor:
    """Returns a rank's range of a saved tensor, [length]. Raises: CheckpointError if it is of another shape."""
    if whole.shape != shape:
        raise CheckpointError(
            f"the state is of another model: the state of {name!r} must be of shape {tuple(shape)}, got "
            f"{tuple(whole.shape)}"
        )
    return whole.flatten()[start : start + length]


def join(pieces: Sequence[Tensor | None], starts: Sequence[int], shape: Sequence[int]) -> Tensor | None:
    """Returns the tensor that the pieces of all ranks make up; None if no rank has one."""
    given = [(piece, start) for piece, start in zip(pieces, starts, strict=True) if piece is not None]
    if not given:
        return None
    whole = given[0][0].new_zeros(torch.Size(shape).numel())
    for piece, start in given:
        whole[start : start + piece.numel()] = piece.to(whole)
    return whole.view(tuple(shape))
