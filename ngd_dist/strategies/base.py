"""The contract of a movement, and the flat buffers that all of them send."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ngd_dist.comm import Communicator
from ngd_dist.inversion import Ending
from ngd_dist.placement import Placement
from ngd_dist.staleness import Verdict
from ngd_dist.statistics import Key

__all__ = ["Collected", "Findings", "Local", "Report", "Shapes", "Strategy", "collected", "split_like"]


@dataclass(frozen=True, slots=True)
class Report:
    """What the first owner of a layer found when one of its statistics was due. Travels as three numbers."""

    verdict: Verdict
    ending: Ending
    change: float

    def numbers(self) -> list[float]:
        """Returns the report as it travels. An infinite change (no earlier value) travels as -1."""
        return [float(self.verdict), float(self.ending), self.change if self.change < float("inf") else -1.0]

    @classmethod
    def parse(cls, numbers: Sequence[float]) -> "Report":
        """Returns the report that was sent."""
        verdict, ending, change = numbers
        return cls(Verdict(int(verdict)), Ending(int(ending)), float("inf") if change == -1.0 else change)


REPORT_NUMBERS = 3


@dataclass(frozen=True, slots=True)
class Shapes:
    """Of every layer: grad_BOI, and those entries of its cache that every rank needs (often none)."""

    gradients: Mapping[str, tuple[int, ...]]
    shared: Mapping[str, Mapping[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Local:
    """What one rank brings to a step.

    `non_finite`, [1], is 1 if this rank's gradients have NaN or infinity. `due` holds the flat value of every due
    statistic (zeros where none was captured); `counts`, [1] each, whether a due layer was captured: 1 or 0, or NaN if
    not once per micro-batch; `gradients` grad_BOI of every layer; `plain` all other gradients.
    """

    non_finite: Tensor
    due: Mapping[Key, Tensor]
    counts: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    plain: list[Tensor]


@dataclass(frozen=True, slots=True)
class Collected:
    """Means over the global batch, of the layers that this rank owns (statistics, gradients) and of all (plain).

    `is_finite` is the same on every rank. `statistics` lacks the due ones that no rank captured, because their module
    did not run, and those of `miscounted` layers.
    """

    is_finite: bool
    miscounted: frozenset[str]
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
    counts: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    plain: list[Tensor],
) -> Collected:
    """Returns each summed statistic divided by the number of ranks that captured it, beside the gradients.

    Reads one number, and one per due layer, back to the host in one go: what was captured decides what is refreshed,
    and a step with a non-finite gradient must not begin. It is the one host read of a step without a refresh.
    """
    bad, *found = torch.cat([non_finite, *counts.values()]).tolist()
    captured = dict(zip(counts, found, strict=True))
    means = {key: total / captured[key.layer] for key, total in sums.items() if captured[key.layer] > 0}
    miscounted = frozenset(layer for layer, count in captured.items() if math.isnan(count))
    return Collected(bad == 0, miscounted, means, dict(gradients), plain)
