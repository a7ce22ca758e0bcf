"""Statistic: one named tensor averaged over time, with what is needed to tell how fast it changes.

A symmetric statistic travels and is remembered as its packed upper triangle, row by row: n (n + 1) / 2 numbers.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Change", "Key", "Statistic", "StatisticSpec", "pack", "packed_size", "unpack"]


class Key(NamedTuple):
    """Names one statistic of one layer."""

    layer: str
    statistic: str

    def __str__(self) -> str:
        return f"{self.layer}.{self.statistic}"


@lru_cache(maxsize=256)
def _triangle(n: int, device: torch.device) -> Tensor:
    """Returns where in a flat n x n matrix each number of its packed triangle is: int32 [n (n + 1) / 2]."""
    rows, columns = torch.triu_indices(n, n, device=device)
    index: Tensor = rows * n + columns
    return index.int()


@lru_cache(maxsize=256)
def _places(n: int, device: torch.device) -> Tensor:
    """Returns where in its packed triangle each number of a flat symmetric n x n matrix is: int32 [n n]."""
    places = torch.empty(n, n, dtype=torch.int32, device=device)
    rows, columns = torch.triu_indices(n, n, device=device)
    packed = torch.arange(len(rows), dtype=torch.int32, device=device)
    places[rows, columns] = packed
    places[columns, rows] = packed
    return places.flatten()


def packed_size(n: int) -> int:
    """Returns how many numbers the packed triangle of an n x n matrix has."""
    return n * (n + 1) // 2


def pack(matrix: Tensor) -> Tensor:
    """Returns the upper triangles of symmetric [..., n, n] matrices, row by row, as [..., n (n + 1) / 2]."""
    packed: Tensor = matrix.flatten(-2).index_select(-1, _triangle(matrix.shape[-1], matrix.device))
    return packed


def unpack(triangle: Tensor, n: int) -> Tensor:
    """Returns the symmetric [..., n, n] matrices whose upper triangles were packed."""
    # One gather: of what a copy of the upper half and its transpose cost, a fourth.
    whole: Tensor = triangle.index_select(-1, _places(n, triangle.device)).unflatten(-1, (n, n))
    return whole


@dataclass(frozen=True, slots=True)
class StatisticSpec:
    """What a preconditioner says about one of its statistics.

    A symmetric one is [..., n, n]. A root is [..., R, n], rows X that stand for X^T X. `reads_gradients`: whether it
    needs output gradients, of the loss or of the Fisher's own backward pass, or the forward pass alone. `in_basis`: it
    is measured in what the cache holds at the time, and starts anew when that changes.
    """

    name: str
    shape: tuple[int, ...]
    is_symmetric: bool = False
    is_root: bool = False
    reads_gradients: bool = True
    in_basis: bool = False

    def norm(self, value: Tensor) -> Tensor:
        """Returns the Frobenius norm of what the value stands for, []: of X^T X for a root."""
        norm: Tensor = torch.linalg.vector_norm(value @ value.mT if self.is_root else value)
        return norm

    def distance(self, value: Tensor, other: Tensor) -> Tensor:
        """Returns the norm of the difference, []; of roots from R x R products, without forming either X^T X."""
        if not self.is_root:
            difference: Tensor = torch.linalg.vector_norm(value - other)
            return difference
        own, cross, others = (
            torch.linalg.vector_norm(x @ y.mT).square() for x, y in ((value, value), (value, other), (other, other))
        )
        squared: Tensor = (own - 2 * cross + others).clamp(min=0)  # rounding may leave less than nothing
        return squared.sqrt()

    @property
    def numbers(self) -> int:
        """Returns how many numbers travel and are kept."""
        return prod(self.shape[:-2]) * packed_size(self.shape[-1]) if self.is_symmetric else prod(self.shape)

    def flatten(self, value: Tensor) -> Tensor:
        """Returns the value as it travels: [numbers]."""
        return pack(value).flatten() if self.is_symmetric else value.flatten()

    def expand(self, flat: Tensor) -> Tensor:
        """Returns the value that was flattened."""
        if not self.is_symmetric:
            return flat.view(self.shape)
        n = self.shape[-1]
        return unpack(flat.view(*self.shape[:-2], packed_size(n)), n)


class Change(NamedTuple):
    """Relative Frobenius change of a statistic against its last value and the one before; infinity where none is.

    Relative to the smaller of the two norms, where [OT20] has that of the earlier value: a statistic that vanishes
    would change by 1 at most. `norm` is that of the newest value.
    """

    to_last: float
    to_before: float
    norm: float = float("inf")


class Statistic:
    """A moving average that knows its own weight, so that it is unbiased from the first value on.

    `value` is None until the first fold. The value before the newest is kept flat (packed if symmetric) for `fold` to
    measure the change, only where `remembers` is true: on the one rank whose measurement counts.
    """

    def __init__(self, spec: StatisticSpec, *, ema_decay: float, remembers: bool) -> None:
        self.spec = spec
        self.ema_decay = ema_decay
        self.remembers = remembers
        self.weight = 0.0
        self.value: Tensor | None = None
        self._before: Tensor | None = None

    def fold(self, new: Tensor) -> Change:
        """Averages in the newest value, which it may keep; returns how far that value is from the last averages.

        The value itself is compared, since an average with a long memory hardly moves when its statistic jumps. Where
        the statistic does not remember, nothing is measured and the change is infinite.
        """
        past = self.ema_decay * self.weight
        last, self.weight = self.value, past + 1.0
        self.value = new if last is None or past == 0.0 else torch.lerp(last, new, 1.0 / self.weight)
        if not self.remembers:
            return Change(float("inf"), float("inf"))
        before = None if self._before is None else self.spec.expand(self._before)
        self._before = None if last is None else self.spec.flatten(last)
        return _change(self.spec, new, last, before)

    @property
    def spread(self) -> float:
        """How much noisier the change of the next value is than the value: sqrt(2), or less against an average.

        Values of equal noise, weighed by w_i, average to one of the relative variance sum w_i^2 / (sum w_i)^2; the
        newest adds its own. For w_i = d^i both sums follow from d and the sum of weights w alone.
        """
        past, decay = self.weight, self.ema_decay
        if past == 0:
            return 1.0
        return math.sqrt(1 + (2 - past * (1 - decay)) / ((1 + decay) * past))

    def reset(self) -> None:
        """Forgets every value: what comes next is measured in another basis."""
        self.weight, self.value, self._before = 0.0, None, None

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps: flat tensors and the weight."""
        value = None if self.value is None else self.spec.flatten(self.value)
        return {"value": value, "before": self._before, "weight": self.weight}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Takes over a saved state."""
        value, before = state["value"], state["before"]
        self.weight = state["weight"]
        self.value = None if value is None else self.spec.expand(value.to(device))
        self._before = before.to(device) if self.remembers and before is not None else None


def _change(spec: StatisticSpec, value: Tensor, last: Tensor | None, before: Tensor | None) -> Change:
    """Returns ||value - reference|| / min(||value||, ||reference||) of both; infinity by 0. One host read."""
    references = [reference for reference in (last, before) if reference is not None]
    measured = [m for reference in references for m in (spec.distance(value, reference), spec.norm(reference))]
    norm, *pairs = torch.stack([spec.norm(value), *measured]).tolist()
    changes = [
        difference / min(length, norm) if min(length, norm) else math.inf
        for difference, length in zip(pairs[::2], pairs[1::2], strict=True)
    ]
    to_last, to_before, *_ = [*changes, math.inf, math.inf]
    return Change(to_last, to_before, norm)
