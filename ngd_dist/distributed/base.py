"""What a rank brings to a step, what it gets back, and what ranks tell each other."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor

from ngd_dist.factors.form import Form
from ngd_dist.inversion import Ending
from ngd_dist.statistics.staleness import REFRESHED, Verdict
from ngd_dist.statistics.statistic import Key, StatisticSpec

__all__ = [
    "REPORT_NUMBERS",
    "CaptureCount",
    "GlobalMeans",
    "LayerLayout",
    "LocalContribution",
    "RefreshReport",
    "StepResult",
    "flatten",
    "read_counts",
    "split_like",
]


UNMEASURED = float("inf")


@dataclass(frozen=True, slots=True)
class RefreshReport:
    """What the first owner of a layer found when one of its statistics was due. Travels as numbers.

    `rows`: how many all ranks estimated it from. `change` and `change_to_before`: relative to the last value in use,
    and to the one before. `noise`: the value's own relative sampling error. `threshold`: what the changes were held
    against. `error`: of the inverse that was in use, for the new value. `residual`: of the new inverse. `seconds`: host
    time on the owner, for estimating the statistic and for its inversion. Infinity stands for what was not measured.
    """

    verdict: Verdict
    ending: Ending
    rows: int = 0
    change: float = UNMEASURED
    change_to_before: float = UNMEASURED
    noise: float = UNMEASURED
    threshold: float = UNMEASURED
    error: float = UNMEASURED
    residual: float = UNMEASURED
    seconds: float = 0.0

    @property
    def makes_anew(self) -> bool:
        """Whether what the statistic is for is made anew: not if the old one was measured, and found good enough."""
        is_kept = self.error != UNMEASURED and self.verdict is not Verdict.CHANGED
        return self.verdict in REFRESHED and not is_kept

    def numbers(self) -> list[float]:
        """Returns the report as it travels. Infinity travels as -1."""
        return [-1.0 if number == UNMEASURED else float(number) for number in astuple(self)]

    @classmethod
    def parse(cls, numbers: Sequence[float]) -> "RefreshReport":
        """Returns the report that was sent."""
        verdict, ending, rows, *measured = numbers
        known = (UNMEASURED if number == -1.0 else number for number in measured)
        return cls(Verdict(int(verdict)), Ending(int(ending)), int(rows), *known)


REPORT_NUMBERS = len(fields(RefreshReport))


@dataclass(frozen=True, slots=True)
class CaptureCount:
    """What stands behind the means of one layer's due statistics, over all ranks.

    `ranks` captured it, in so many `replicates` and `rows`. `squares`: by statistic, the mean over replicates of their
    squared norms; empty where noise is not measured.
    """

    ranks: int
    rows: int
    replicates: int
    squares: Mapping[str, float]

    def noise(self, statistic: str, norm: float) -> float:
        """Returns the relative sampling error of a mean of this norm; infinity where replicates can't tell it.

        The K replicates X_k of a mean X scatter about it by mean_k ||X_k||^2 - ||X||^2; 1 / (K - 1) of that is the
        expected squared error of X, for shares of any size.
        """
        square = self.squares.get(statistic, 0.0)
        if self.replicates < 2 or not (0 < norm < UNMEASURED and 0 < square < UNMEASURED):
            return UNMEASURED
        scatter = max(0.0, square - norm**2)  # rounding may leave less than none
        return math.sqrt(scatter / (self.replicates - 1)) / norm


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """What travels of one layer: its gradient's shape, [B, O, I]; its statistics; the entries of its cache.

    `dtype`: of these entries. `shared`: those that every rank needs, of which each is a function of the statistics that
    are not `in_basis`.
    """

    gradient: tuple[int, ...]
    statistics: Sequence[StatisticSpec]
    cache: Mapping[str, Form]
    dtype: torch.dtype
    shared: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LocalContribution:
    """What one rank brings to a step, beside the statistics that it has offered.

    `flags`, [2]: 1 if this rank's gradients have NaN or infinity, and the number of parameters without one. `counts`:
    by due layer, this rank's part of the sums in a `CaptureCount`: 1 or 0 for whether it was captured, NaN if in too
    many micro-batches, infinity if its values are useless after they were sent; then rows, replicates, and the mean
    square of each due statistic. `gradients`: grad_BOI of every layer. `plain`: the other gradients.
    """

    flags: Tensor
    counts: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    plain: list[Tensor]


@dataclass(frozen=True, slots=True)
class GlobalMeans:
    """Means over the global batch: statistics of the layers that this rank inverts, gradients of those that it holds,
    and all plain ones.

    `is_finite` is the same on every rank. `statistics` lacks the due ones that no rank captured, because their module
    did not run, and those of `miscounted` layers. `counts` has those of the layers that `statistics` has. `missing`:
    the sum over ranks of how many parameters have no gradient.
    """

    is_finite: bool
    missing: int
    miscounted: frozenset[str]
    counts: dict[str, CaptureCount]
    statistics: dict[Key, Tensor]
    gradients: dict[str, Tensor]
    plain: list[Tensor]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What follows from the means: one rank's part before `publish`, the whole after, the same on every rank.

    `directions`, [B, O, I] by layer. `inner`, [rows, layers in registration order]: inner products per layer, 0 for
    those that this rank does not hold; any number of rows, the same on every rank.
    """

    directions: dict[str, Tensor]
    reports: dict[Key, RefreshReport]
    inner: Tensor


def flatten(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Returns the tensors as one flat buffer."""
    buffer = tensors[0].new_empty(sum(tensor.numel() for tensor in tensors), dtype=dtype)
    for part, tensor in zip(split_like(buffer, tensors), tensors, strict=True):
        part.copy_(tensor)
    return buffer


def split_like(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns views of the buffer's beginning in the shapes of the tensors."""
    parts = buffer[: sum(tensor.numel() for tensor in tensors)].split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def read_counts(
    flags: Tensor, counts: Mapping[str, Tensor], due: Sequence[Key]
) -> tuple[bool, int, frozenset[str], dict[str, CaptureCount]]:
    """Returns if all is finite, the missing gradients, the miscounted layers, and the counts of others that ran.

    Reads two numbers, and a few per due layer, back to the host in one go: what was captured decides what is refreshed,
    and a step with a non-finite gradient must not begin. It is the one host read of a step without a refresh.
    """
    bad, missing, *numbers = torch.cat([flags, *counts.values()]).tolist()
    found: dict[str, CaptureCount] = {}
    miscounted: set[str] = set()
    for layer, count in counts.items():
        (ranks, rows, replicates, *squares), numbers = numbers[: len(count)], numbers[len(count) :]
        if math.isnan(ranks):
            miscounted.add(layer)
        elif 0 < ranks < math.inf:
            names = [key.statistic for key in due if key.layer == layer]
            means = {name: square / ranks for name, square in zip(names, squares, strict=False)}
            found[layer] = CaptureCount(int(ranks), int(rows), int(replicates), means)
    return bad == 0, int(missing), frozenset(miscounted), found
