"""Statistic: one named tensor that is averaged over time and measures its own change."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ngd_dist.factors.form import Form

__all__ = ["Change", "Key", "Positions", "Statistic", "StatisticSpec", "by_layer"]


class Key(NamedTuple):
    """Names one statistic of one layer."""

    layer: str
    statistic: str

    def __str__(self) -> str:
        return f"{self.layer}.{self.statistic}"


def by_layer(keys: Iterable[Key]) -> dict[str, list[str]]:
    """Returns the names of each layer's statistics, both in the order of the keys."""
    names: dict[str, list[str]] = {}
    for layer, statistic in keys:
        names.setdefault(layer, []).append(statistic)
    return names


@dataclass(frozen=True, slots=True)
class StatisticSpec:
    """The description of one of a preconditioner's statistics.

    `form`: the form of its value. `reads_gradients`: whether it needs output gradients, of the loss or of a Fisher
    pass, or the forward pass alone. `in_basis`: whether it is measured in a basis of the cache, and restarts when that
    changes. `per_position`: the power of the number of positions by which it is divided, 1 (True) for a mean over them
    too; see `Positions`. `moment`: 2 if it is quadratic in gradients, 1 if it is linear. `reduction`: "mean": its value
    is the mean over ranks; "local": each rank keeps that of its own samples, and the layer's cache made of it. Every
    rank then applies its own cache to the mean gradient, and the direction is the mean of what they give.
    """

    name: str
    form: Form
    reads_gradients: bool = True
    in_basis: bool = False
    per_position: float = False
    moment: Literal[1, 2] = 2
    reduction: Literal["mean", "local"] = "mean"

    @property
    def is_local(self) -> bool:
        """Whether its value stays on the rank that measured it."""
        return self.reduction == "local"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its value."""
        return self.form.shape


class Positions(NamedTuple):
    """Mean numbers of positions of a sample: those of the output that the loss `read`, and those of the `layer`.

    Texts differ in length, so that micro-batches differ in both. A micro-batch's statistics are made with its own, and
    the mean over micro-batches with those of all: it does not depend on the division of the batch.
    """

    read: float | Tensor = 1.0
    layer: float | Tensor = 1.0

    def factor(self, spec: StatisticSpec, power: int) -> float | Tensor:
        """Returns the part of the statistic that these numbers make up. power: that of `read` in a second moment."""
        factor = self.read ** (power * spec.moment / 2) if spec.reads_gradients else 1.0
        return factor / self.layer**spec.per_position if spec.per_position else factor


class Change(NamedTuple):
    """Relative Frobenius change of a statistic against its last value and the one before; infinity without one.

    Relative to the smaller of the two norms. [OT20] takes the norm of the earlier value, so that a statistic that
    vanishes changes by 1 at most. `norm` is that of the newest value.
    """

    to_last: float
    to_before: float
    norm: float = float("inf")


class Statistic:
    """A moving average that knows its own weight, so that it is unbiased from the first value on.

    `value` is None until the first fold. If `remembers` is true, as on the one rank that reports, the value before the
    newest is kept flat, so that `fold` can measure the change.
    """

    def __init__(self, spec: StatisticSpec, *, ema_decay: float, remembers: bool) -> None:
        self.spec = spec
        self.ema_decay = ema_decay
        self.remembers = remembers
        self.weight = 0.0
        self.value: Tensor | None = None
        self._before: Tensor | None = None

    def fold(self, new: Tensor) -> Change:
        """Averages in the newest value, which it may keep; returns the change of that value against the last averages.

        The value itself is compared, since an average with a long memory hardly moves when its statistic jumps. If the
        statistic does not remember, the change is infinite.
        """
        past = self.ema_decay * self.weight
        last, self.weight = self.value, past + 1.0
        if last is None or past == 0.0:
            self.value = new
        else:
            self.value = self.spec.form.averaged(last, new, 1 / self.weight, reuses=not self.remembers)
        if not self.remembers:
            return Change(float("inf"), float("inf"))
        before = None if self._before is None else self.spec.form.recalled(self._before)
        self._before = None if last is None else self.spec.form.remembered(last)
        return _change(self.spec.form, new, last, before)

    @property
    def spread(self) -> float:
        """The noise of the next value's change over that of the value: sqrt(2), or less against an average.

        An average of values of equal noise, weighed by w_i, has the relative variance sum w_i^2 / (sum w_i)^2; the
        newest value adds 1. For w_i = d^i both sums follow from d and the sum of weights alone.
        """
        past, decay = self.weight, self.ema_decay
        if past == 0:
            return 1.0
        return math.sqrt(1 + (2 - past * (1 - decay)) / ((1 + decay) * past))

    def reset(self) -> None:
        """Forgets every value: the next one is measured in another basis."""
        self.weight, self.value, self._before = 0.0, None, None

    def state(self) -> dict[str, Any]:
        """Returns the state for a checkpoint: flat tensors and the weight."""
        value = None if self.value is None else self.spec.form.remembered(self.value)
        return {"value": value, "before": self._before, "weight": self.weight}

    def load(self, state: dict[str, Any], device: torch.device, *, keeps_rows: bool = True) -> None:
        """Takes over a saved state. keeps_rows: whether a value may be rows that stand for a matrix."""
        form = self.spec.form

        def recalled(flat: Tensor) -> Tensor:
            value = form.recalled(flat.to(device))
            return value if keeps_rows else form.whole(value)

        value, before = state["value"], state["before"]
        self.weight = state["weight"]
        self.value = None if value is None else recalled(value)
        self._before = form.remembered(recalled(before)) if self.remembers and before is not None else None


def _change(form: Form, value: Tensor, last: Tensor | None, before: Tensor | None) -> Change:
    """Returns ||value - reference|| / min(||value||, ||reference||) of both; infinity by 0. One host read."""
    references = [reference for reference in (last, before) if reference is not None]
    measured = [m for reference in references for m in (form.distance(value, reference), form.norm(reference))]
    norm, *pairs = torch.stack([form.norm(value), *measured]).tolist()
    changes = [
        difference / min(length, norm) if min(length, norm) else math.inf
        for difference, length in zip(pairs[::2], pairs[1::2], strict=True)
    ]
    to_last, to_before, *_ = [*changes, math.inf, math.inf]
    return Change(to_last, to_before, norm)
