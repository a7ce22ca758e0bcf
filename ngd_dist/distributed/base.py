"""The records of a step: a rank's contribution, the global means, the result, and the reports between ranks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor

from ngd_dist.factors.form import Form
from ngd_dist.inversion import Ending, Method
from ngd_dist.statistics.staleness import REFRESHED, Verdict
from ngd_dist.statistics.statistic import Key, Positions, StatisticSpec, by_layer

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
    """The owner's report on a statistic of its layer that was due. Travels as numbers.

    `rows`: the number from which all ranks estimated it. `method`: of the inversion, the last that was tried; None if
    nothing was inverted. `change` and `change_to_before`: relative to the last value in use, and to the one before.
    `noise`: the relative sampling error of the value. `threshold`: the bound for the changes. `error`: that of the
    inverse that was in use, for the new value. `residual`: that of the new inverse. `seconds`: host time on the owner,
    for estimating the statistic and for its inversion; `inversion_seconds`: for the latter alone. A number that was not
    measured is infinity.
    """

    verdict: Verdict
    ending: Ending
    rows: int = 0
    method: Method | None = None
    change: float = UNMEASURED
    change_to_before: float = UNMEASURED
    noise: float = UNMEASURED
    threshold: float = UNMEASURED
    error: float = UNMEASURED
    residual: float = UNMEASURED
    seconds: float = 0.0
    inversion_seconds: float = 0.0

    @property
    def rebuilds(self) -> bool:
        """Whether the inverse or basis is made again: not if the old one was measured and is good enough."""
        is_kept = self.error != UNMEASURED and self.verdict is not Verdict.CHANGED
        return self.verdict in REFRESHED and not is_kept

    def numbers(self) -> list[float]:
        """Returns the report as it travels. Infinity travels as -1, and so does no method."""
        return [-1.0 if number in (UNMEASURED, None) else float(number) for number in astuple(self)]

    @classmethod
    def parse(cls, numbers: Sequence[float]) -> "RefreshReport":
        """Returns the report that was sent."""
        verdict, ending, rows, method, *measured = numbers
        known = (UNMEASURED if number == -1.0 else number for number in measured)
        tried = None if method == -1.0 else Method(int(method))
        return cls(Verdict(int(verdict)), Ending(int(ending)), int(rows), tried, *known)

    @classmethod
    def of_ranks(cls, reports: Sequence["RefreshReport"]) -> "RefreshReport":
        """Returns the report on a local statistic from those of all ranks, the same on each: the worst of every field.

        Ranks on which its layer did not run count if it ran on none.
        """
        seen = [report for report in reports if report.verdict is not Verdict.UNSEEN] or reports
        if len(seen) == 1:
            return seen[0]
        failed = [report.verdict for report in seen if report.verdict not in REFRESHED]
        verdict = max(failed) if failed else min(report.verdict for report in seen)
        return cls(
            verdict,
            max(report.ending for report in seen),
            max(report.rows for report in seen),
            max((report.method for report in seen if report.method is not None), default=None),
            max(report.change for report in seen),
            max(report.change_to_before for report in seen),
            max(report.noise for report in seen),
            min(report.threshold for report in seen),
            max(report.error for report in seen),
            max(report.residual for report in seen),
            max(report.seconds for report in seen),
            max(report.inversion_seconds for report in seen),
        )


REPORT_NUMBERS = len(fields(RefreshReport))


@dataclass(frozen=True, slots=True)
class CaptureCount:
    """The counts behind the means of one layer's due statistics, over all ranks.

    `ranks`: those that captured it. `rows`, `replicates`: of all ranks. `squares`: by statistic, the mean of the
    squared norms of its replicates; empty if noise is not measured. `positions`: the means over all samples.
    """

    ranks: int
    rows: int
    replicates: int
    squares: Mapping[str, float]
    positions: Positions = Positions()  # noqa: RUF009 - immutable

    def noise(self, statistic: str, norm: float) -> float:
        """Returns the relative sampling error of a mean of this norm; infinity if replicates can't tell it.

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
    """The tensors of one layer that travel: its gradient, of shape [B, O, I]; its statistics; the entries of its cache.

    `dtype`: that of the entries. `shared`: the entries that every rank needs; each is a function of the statistics that
    are not `in_basis`.
    """

    gradient: tuple[int, ...]
    statistics: Sequence[StatisticSpec]
    cache: Mapping[str, Form]
    dtype: torch.dtype
    shared: tuple[str, ...]

    @property
    def is_local(self) -> bool:
        """Whether the cache is of each rank's own: it is made of a statistic that is."""
        return any(spec.is_local for spec in self.statistics)


@dataclass(frozen=True, slots=True)
class LocalContribution:
    """One rank's part of a step, beside the statistics that it has offered.

    `flags`, [2]: 1 if this rank's gradients have NaN or infinity, and the number of parameters without one. `counts`:
    due layer by due layer, this rank's part of the sums in a `CaptureCount`: 1 or 0 for whether it was captured, NaN if
    in too many micro-batches, infinity if its values are useless after they were sent; then rows, replicates, the two
    numbers of `Positions` and, if noise is measured, the mean square of each due statistic. `gradients`: grad_BOI of
    every layer. `plain`: the other gradients.
    """

    flags: Tensor
    counts: Tensor
    gradients: Mapping[str, Tensor]
    plain: list[Tensor]


@dataclass(frozen=True, slots=True)
class GlobalMeans:
    """Means over the global batch: statistics of the layers that this rank inverts, gradients of those that it holds,
    and all plain ones.

    `is_finite` is the same on every rank. `statistics` lacks the due ones that no rank captured, because their module
    did not run, and those of `miscounted` layers; the part that `Positions` have in them is still to be put in. Local
    ones are no means: they are this rank's, if it captured them. `counts` has the layers that any rank captured.
    `missing`: the sum over ranks of the parameters without a gradient.
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
    """The directions and reports of a step: one rank's part before `publish`; after it the whole, on every rank.

    `directions`, [B, O, I] by layer. `inner`, [k, layers in registration order]: inner products per layer, 0 for those
    that this rank does not hold; k is the same on every rank.
    """

    directions: dict[str, Tensor]
    reports: dict[Key, RefreshReport]
    inner: Tensor


def flatten(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Returns the tensors as one flat buffer."""
    buffer = tensors[0].new_empty(sum(tensor.numel() for tensor in tensors), dtype=dtype)
    for view, tensor in zip(split_like(buffer, tensors), tensors, strict=True):
        view.copy_(tensor)
    return buffer


def split_like(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns views of the buffer's beginning in the shapes of the tensors."""
    flat = buffer[: sum(tensor.numel() for tensor in tensors)].split([tensor.numel() for tensor in tensors])
    return [view.view(tensor.shape) for view, tensor in zip(flat, tensors, strict=True)]


def read_counts(
    flags: Tensor, counts: Tensor, due: Sequence[Key]
) -> tuple[bool, int, frozenset[str], dict[str, CaptureCount]]:
    """Returns if all is finite, the missing gradients, the miscounted layers, and the counts of others that ran.

    Reads two numbers, and a few per due layer, back to the host in one go: the captured layers decide the refreshes,
    and a step with a non-finite gradient must not begin. It is the one host read of a step without a refresh.
    """
    bad, missing, *numbers = torch.cat([flags, counts]).tolist()
    captured: dict[str, CaptureCount] = {}
    miscounted: set[str] = set()
    layers, begin = by_layer(due), 0
    has_squares = len(numbers) > 5 * len(layers)
    for layer, names in layers.items():
        end = begin + 5 + len(names) * has_squares
        ranks, rows, replicates, read, positions, *squares = numbers[begin:end]
        begin = end
        if math.isnan(ranks):
            miscounted.add(layer)
        elif 0 < ranks < math.inf:
            means = {name: square / ranks for name, square in zip(names, squares, strict=False)}
            per_sample = Positions(read / ranks, positions / ranks)
            captured[layer] = CaptureCount(int(ranks), int(rows), int(replicates), means, per_sample)
    return bad == 0, int(missing), frozenset(miscounted), captured
