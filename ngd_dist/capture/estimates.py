"""This rank's estimates of the due statistics of one step: means over its micro-batches, and the scatter of replicates.

Replicates show the sampling noise at no cost: they are the micro-batches of all ranks or, if there is only one, the two
halves of its samples. Statistics are linear in rows, so that halves cost no more products than the whole.
"""

import math
import time
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ngd_dist.config import NGDConfig
from ngd_dist.covered import CoveredLayers
from ngd_dist.factors.caches import Caches
from ngd_dist.layers import LayerBatch
from ngd_dist.statistics.statistic import Key, Positions, StatisticSpec

__all__ = ["Estimates"]


@dataclass(slots=True)
class _Mean:
    """One statistic. A replicate is a share of a micro-batch's samples, and their mean, which may grow by passes.

    `factor`: the part that positions have in the micro-batch under way. `total`, without that part, and `square`, with
    it, are sums over micro-batches. `num_replicates`: those of all ranks, among which some forms share
    out a value.
    """

    spec: StatisticSpec
    num_replicates: int
    replicates: list[tuple[float, Tensor]] = field(default_factory=list)
    factor: float | Tensor = 1.0
    count: int = 0
    total: Tensor | None = None
    square: Tensor | None = None
    seconds: float = 0.0

    def add(self, values: Sequence[tuple[float, Tensor]]) -> None:
        """Adds one pass to the replicates that are under way, which have the same shares."""
        if not self.replicates:
            self.replicates = list(values)
            return
        pairs = zip(self.replicates, values, strict=True)
        self.replicates = [(share, self.spec.form.plus(total, value)) for (share, total), (_, value) in pairs]

    def complete(self, *, measures: bool) -> None:
        """Takes the replicates that are under way into the mean and, if noise is measured, into the mean square."""
        for share, value in self.replicates:
            weighted = value if share == 1.0 else self.spec.form.weighted(value, share)
            if not _is_one(self.factor):
                weighted = self.spec.form.times(weighted, 1 / self.factor)
            self.total = weighted if self.total is None else self.spec.form.plus(self.total, weighted)
            if measures:
                square = self.spec.form.norm(value, self.num_replicates).square() * share
                self.square = square if self.square is None else self.square + square
        self.count += len(self.replicates)
        self.replicates = []

    def scaled(self, passes: int, shares: int, divisor: int) -> tuple[Tensor | None, Tensor | None]:
        """Returns the mean over `passes` micro-batches, and its mean square.

        shares: the number of micro-batches that share a value, in forms that do. divisor: the loss of each was divided
        by it, and g was not multiplied by it; a statistic has its square.
        """
        if self.total is None or (passes == 1 and shares == 1 and divisor == 1):
            return self.total, self.square
        power = divisor**2 if self.spec.reads_gradients else 1
        mean = self.spec.form.mean(self.total, passes, shares, power)
        return mean, None if self.square is None else self.square * (power**2 / passes)


class Estimates:
    """Adds up the estimates of preconditioners, pass by pass. `is_alone`: whether this is the only rank."""

    def __init__(self, layers: CoveredLayers, config: NGDConfig, caches: Caches, *, is_alone: bool) -> None:
        self._layers = layers
        self._loss_parts = config.loss_parts
        self._counts_parts = config.micro_batches == "any"
        self._caches = caches
        self._power = config.power_of_positions
        self._measures = config.measures_noise
        self._halves = config.measures_noise and is_alone and config.loss_parts == 1
        self.clear()

    def forget(self, layer: str) -> None:
        """Forgets the passes of one layer."""
        for key in [key for key in self._means if key.layer == layer]:
            del self._means[key]
        self.passes.pop(layer, None)
        self._rows.pop(layer, None)
        self._positions.pop(layer, None)

    def clear(self) -> None:
        """Forgets the last step."""
        self._means: dict[Key, _Mean] = {}
        self.passes: dict[str, int] = defaultdict(int)
        self._rows: dict[str, int] = defaultdict(int)
        self._positions: dict[str, list[Positions]] = defaultdict(list)  # of each micro-batch

    def add(self, name: str, batch: LayerBatch, due: frozenset[str], *, is_first: bool, weight: float) -> None:
        """Adds one backward pass of a layer to its due statistics.

        The first pass of a micro-batch counts it, and adds the statistics that read no gradient. A statistic that reads
        gradients is a sum over the passes of a micro-batch, times `weight`.
        """
        preconditioner = self._layers[name].method
        specs = [spec for spec in preconditioner.statistics if spec.name in due and (is_first or spec.reads_gradients)]
        if is_first:
            self._complete(name)
            self.passes[name] += 1
            self._rows[name] += batch.count
            is_mean = any(spec.per_position for spec in specs)
            self._positions[name].append(Positions(batch.read, _mean(batch.mean_positions_B) if is_mean else 1.0))
        replicates = batch.halves() if self._halves and batch.samples > 1 else (batch,)
        shares = [replicate.samples / batch.samples for replicate in replicates]
        for spec in specs:
            start = time.perf_counter()
            alone, scale = frozenset({spec.name}), weight if spec.reads_gradients else 1.0
            estimates = [preconditioner.estimate(part, alone, self._caches.shared_of(name)) for part in replicates]
            values = [estimate[spec.name] for estimate in estimates if estimate]
            mean = self._means.setdefault(Key(name, spec.name), _Mean(spec, replicates[0].replicate.count))
            mean.factor = self._positions[name][-1].factor(spec, self._power)
            if values:  # else there is no basis yet to measure it in
                scaled = values if scale == 1.0 else [spec.form.weighted(value, scale) for value in values]
                mean.add(list(zip(shares, scaled, strict=True)))
            mean.seconds += time.perf_counter() - start

    def per_position(self, key: Key, value: Tensor) -> Tensor:
        """Returns a statistic of `values`, whole, with the part that positions have in it."""
        spec = self._means[key].spec
        factor = self._mean_positions(key.layer).factor(spec, self._power)
        return spec.form.whole(value if _is_one(factor) else spec.form.times(value, factor))

    def values(self) -> dict[Key, Tensor]:
        """Returns the mean of each statistic over this rank's samples, without the part that positions have in it."""
        return {key: value for layer in self.passes for key, value in self.of(layer).items()}

    def of(self, layer: str) -> dict[Key, Tensor]:
        """Returns those of one layer, over the samples seen so far."""
        self._complete(layer)
        means = ((key, self._scaled(mean, layer)[0]) for key, mean in self._means.items() if key.layer == layer)
        return {key: total for key, total in means if total is not None}

    def seconds(self, key: Key) -> float:
        """Returns the host seconds that estimating the statistic took."""
        return self._means[key].seconds if key in self._means else 0.0

    def counts(
        self, due: Sequence[Key], wrong: Collection[str], device: torch.device, spoiled: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """Returns the numbers of a `CaptureCount` for each due layer, which travel beside its statistics.

        The first is 0 for a layer that was not captured, NaN for the layers in `wrong`, captured too often, and
        infinity for those in `spoiled`.
        """
        counts: dict[str, Tensor] = {}
        for layer in dict.fromkeys(key.layer for key in due):
            means = [self._means.get(key) for key in due if key.layer == layer]
            captured = [mean for mean in means if mean is not None and mean.total is not None]
            first = math.nan if layer in wrong else math.inf if layer in spoiled else float(bool(captured))
            count = max((mean.count for mean in captured), default=0)
            positions = self._mean_positions(layer) if captured else (0.0, 0.0)
            known = [first, self._rows.get(layer, 0), count, *(0.0 if isinstance(p, Tensor) else p for p in positions)]
            numbers = torch.tensor(known, dtype=torch.float64, device=device)
            if isinstance(positions[-1], Tensor):  # of a ragged batch: not read back here
                numbers[-1] = positions[-1]
            measured = [None if mean is None else self._scaled(mean, layer)[1] for mean in means]
            squares = [numbers.new_zeros(()) if square is None else square.to(numbers) for square in measured]
            counts[layer] = torch.cat([numbers, torch.stack(squares)]) if self._measures else numbers
        return counts

    def _scaled(self, mean: _Mean, layer: str) -> tuple[Tensor | None, Tensor | None]:
        passes = self.passes[layer]
        return mean.scaled(passes, self._loss_parts, passes if self._counts_parts else 1)

    def _mean_positions(self, layer: str) -> Positions:
        """Returns the means over this rank's micro-batches of a layer."""
        each = self._positions.get(layer, [Positions()])
        return Positions(sum(p.read for p in each) / len(each), sum(p.layer for p in each) / len(each))

    def _complete(self, layer: str) -> None:
        for key, mean in self._means.items():
            if key.layer == layer:
                mean.complete(measures=self._measures)


def _mean(positions_B: Tensor) -> float | Tensor:
    """Returns the mean over blocks, which differ alike in all micro-batches: [] on a device, a number on the CPU."""
    mean = positions_B.mean()
    return float(mean) if mean.device.type == "cpu" else mean


def _is_one(factor: float | Tensor) -> bool:
    return isinstance(factor, float) and factor == 1.0
