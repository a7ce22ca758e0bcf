"""The contract of a movement, and the flat buffers that all of them send."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ngd_dist.comm import Communicator
from ngd_dist.inversion import Ending
from ngd_dist.placement import Placement
from ngd_dist.staleness import Verdict
from ngd_dist.statistics import Key

__all__ = ["Collected", "Local", "Report", "Strategy", "collected", "split_like"]


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
class Local:
    """What one rank brings to a step.

    `due` holds the flat value of every due statistic (zeros where none was captured); `counts`, [1] each, whether a
    due layer was captured: 1 or 0, or NaN if not once per micro-batch; `gradients` grad_OI of every layer; `plain` all
    other gradients.
    """

    due: Mapping[Key, Tensor]
    counts: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    plain: list[Tensor]


@dataclass(frozen=True, slots=True)
class Collected:
    """Means over the global batch, of the layers that this rank owns (statistics, gradients) and of all (plain).

    `statistics` lacks the due ones that no rank captured, because their module did not run, and those of `miscounted`
    layers.
    """

    miscounted: frozenset[str]
    statistics: dict[Key, Tensor]
    gradients: dict[str, Tensor]
    plain: list[Tensor]


class Strategy(ABC):
    """Moves what a step produces. Every rank must make the same calls; due keys are the same on every rank."""

    def __init__(
        self,
        comm: Communicator,
        placement: Placement,
        shapes: Mapping[str, tuple[int, int]],
        *,
        dtype: torch.dtype,
        wire_dtype: torch.dtype,
        device: torch.device,
        gradient_scale: float | None,
    ) -> None:
        """Takes [O, I] of every layer, and the dtypes on the way: of gradients and directions, and of statistics.

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
    def publish(
        self, directions: Mapping[str, Tensor], reports: Mapping[Key, Report], due: Sequence[Key]
    ) -> tuple[dict[str, Tensor], dict[Key, Report]]:
        """Collective. Returns all layers' directions, and the counting report on every due statistic.

        `directions` and `reports` are this rank's.
        """

    def flatten(self, tensors: Sequence[Tensor], dtype: torch.dtype, size: int | None = None) -> Tensor:
        """Returns the tensors as one flat buffer, zero-padded to `size` numbers."""
        length = sum(tensor.numel() for tensor in tensors)
        buffer = torch.zeros(length if size is None else size, dtype=dtype, device=self.device)
        for part, tensor in zip(split_like(buffer, tensors), tensors, strict=True):
            part.copy_(tensor)
        return buffer


def split_like(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns views of the buffer's beginning in the shapes of the tensors."""
    sizes = [tensor.numel() for tensor in tensors]
    parts = buffer[: sum(sizes)].split(sizes)
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def collected(
    sums: Mapping[Key, Tensor], counts: Mapping[str, Tensor], gradients: Mapping[str, Tensor], plain: list[Tensor]
) -> Collected:
    """Returns each summed statistic divided by the number of ranks that captured it, beside the gradients.

    Reads one number per due layer back to the host: what was captured decides what is refreshed.
    """
    captured = {layer: float(count) for layer, count in counts.items()}
    means = {key: total / captured[key.layer] for key, total in sums.items() if captured[key.layer] > 0}
    miscounted = frozenset(layer for layer, count in captured.items() if math.isnan(count))
    return Collected(miscounted, means, dict(gradients), plain)
