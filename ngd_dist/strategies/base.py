"""The contract of a movement, and the flat buffers that all of them send."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from math import prod

import torch
from torch import Tensor

from ngd_dist.comm import Communicator
from ngd_dist.inversion import Ending
from ngd_dist.placement import Placement
from ngd_dist.staleness import Verdict
from ngd_dist.statistics import Key

__all__ = ["Collected", "Findings", "Local", "Report", "Shapes", "Strategy", "collected", "split_like"]


UNMEASURED = float("inf")


@dataclass(frozen=True, slots=True)
class Report:
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

    def numbers(self) -> list[float]:
        """Returns the report as it travels. Infinity travels as -1."""
        return [-1.0 if number == UNMEASURED else float(number) for number in astuple(self)]

    @classmethod
    def parse(cls, numbers: Sequence[float]) -> "Report":
        """Returns the report that was sent."""
        verdict, ending, rows, *measured = numbers
        known = (UNMEASURED if number == -1.0 else number for number in measured)
        return cls(Verdict(int(verdict)), Ending(int(ending)), int(rows), *known)


REPORT_NUMBERS = len(fields(Report))


@dataclass(frozen=True, slots=True)
class Tally:
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
class Shapes:
    """Of every layer: grad_BOI, and those entries of its cache that every rank needs (often none)."""

    gradients: Mapping[str, tuple[int, ...]]
    shared: Mapping[str, Mapping[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Local:
    """What one rank brings to a step.

    `non_finite`, [1], is 1 if this rank's gradients have NaN or infinity. `due` holds the flat value of every due
    statistic (zeros where none was captured); `tallies`, by due layer, the numbers of a `Tally`, whose sums over ranks
    it is made of: 1 or 0 for whether it was captured, or NaN if not once per micro-batch, rows, replicates, and the
    mean square of each due statistic; `gradients` grad_BOI of every layer; `plain` all other gradients.
    """

    non_finite: Tensor
    due: Mapping[Key, Tensor]
    tallies: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    plain: list[Tensor]


@dataclass(frozen=True, slots=True)
class Collected:
    """Means over the global batch, of the layers that this rank owns (statistics, gradients) and of all (plain).

    `is_finite` is the same on every rank. `statistics` lacks the due ones that no rank captured, because their module
    did not run, and those of `miscounted` layers. `tallies` has those of the layers that `statistics` has.
    """

    is_finite: bool
    miscounted: frozenset[str]
    tallies: dict[str, Tally]
    statistics: dict[Key, Tensor]
    gradients: dict[str, Tensor]
    plain: list[Tensor]


@dataclass(frozen=True, slots=True)
class Findings:
    """What follows from the means: one rank's part before `publish`, the whole after, the same on every rank.

    `directions`, [B, O, I] by layer. `inner`, [rows, layers in registration order]: inner products per layer, 0 for
    those of other ranks; any number of rows, the same on every rank. `shared`: by due layer, the cache entries that
    every rank needs, or None where there is no cache.
    """

    directions: dict[str, Tensor]
    reports: dict[Key, Report]
    inner: Tensor
    shared: dict[str, dict[str, Tensor] | None]


class Strategy(ABC):
    """Moves what a step produces. Every rank must make the same calls; due keys are the same on every rank.

    `is_replicated`: every rank does every layer's work.
    """

    is_replicated: bool

    def __init__(
        self,
        comm: Communicator,
        placement: Placement,
        shapes: Shapes,
        *,
        dtype: torch.dtype,
        wire_dtype: torch.dtype,
        device: torch.device,
        gradient_scale: float | None,
    ) -> None:
        """Takes the dtypes on the way: of gradients and directions, and of statistics.

        Gradients are summed over ranks and multiplied by `gradient_scale`; None leaves them as they are, where an
        engine (DDP) has averaged them already.
        """
        self.comm = comm
        self.placement = placement
        self.shapes = shapes
        self.dtype = dtype
        self.wire_dtype = wire_dtype
        self.device = device
        self.gradient_scale = gradient_scale

    @abstractmethod
    def holds(self, layer: str) -> bool:
        """Returns whether this rank refreshes and applies the layer's preconditioner."""

    def reports(self, layer: str) -> bool:
        """Returns whether this rank's reports on the layer count."""
        return self.placement.owners(layer)[0] == self.comm.rank

    def statistic_bytes(self, numbers: int) -> int:
        """Returns what each rank sends, under ring algorithms, of a statistic of so many numbers."""
        ranks = self.comm.world_size
        return numbers * self.wire_dtype.itemsize * (2 if self.is_replicated else 1) * (ranks - 1) // ranks

    @abstractmethod
    def collect(self, local: Local) -> Collected:
        """Collective. Returns the means over ranks."""

    @abstractmethod
    def publish(self, findings: Findings, due: Sequence[Key]) -> Findings:
        """Collective. Returns the findings of all ranks; on each statistic, the report that counts."""

    def flatten(self, tensors: Sequence[Tensor], dtype: torch.dtype, size: int | None = None) -> Tensor:
        """Returns the tensors as one flat buffer, zero-padded to `size` numbers."""
        length = sum(tensor.numel() for tensor in tensors)
        buffer = torch.zeros(length if size is None else size, dtype=dtype, device=self.device)
        for part, tensor in zip(split_like(buffer, tensors), tensors, strict=True):
            part.copy_(tensor)
        return buffer


def split_like(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns views of the buffer's beginning in the shapes of the tensors."""
    return split_shapes(buffer, [tuple(tensor.shape) for tensor in tensors])


def split_shapes(buffer: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Returns views of the buffer's beginning in these shapes."""
    sizes = [prod(shape) for shape in shapes]
    parts = buffer[: sum(sizes)].split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def collected(
    non_finite: Tensor,
    sums: Mapping[Key, Tensor],
    tallies: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    plain: list[Tensor],
) -> Collected:
    """Returns each summed statistic divided by the number of ranks that captured it, beside the gradients.

    Reads one number, and a few per due layer, back to the host in one go: what was captured decides what is refreshed,
    and a step with a non-finite gradient must not begin. It is the one host read of a step without a refresh.
    """
    bad, *numbers = torch.cat([non_finite, *tallies.values()]).tolist()
    found: dict[str, Tally] = {}
    miscounted: set[str] = set()
    for layer, tally in tallies.items():
        (ranks, rows, replicates, *squares), numbers = numbers[: len(tally)], numbers[len(tally) :]
        if math.isnan(ranks):
            miscounted.add(layer)
        elif ranks > 0:
            due = [key.statistic for key in sums if key.layer == layer]
            means = {statistic: square / ranks for statistic, square in zip(due, squares, strict=False)}
            found[layer] = Tally(int(ranks), int(rows), int(replicates), means)
    values = {key: total / found[key.layer].ranks for key, total in sums.items() if key.layer in found}
    return Collected(bad == 0, frozenset(miscounted), found, values, dict(gradients), plain)
