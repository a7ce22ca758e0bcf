"""This rank's estimates of the due statistics of one step: means over its micro-batches, and the scatter of replicates.

Replicates show the sampling noise at no cost: they are the micro-batches of all ranks or, if there is only one, the two
halves of its samples. Statistics are linear in rows, so that halves cost no more products than the whole.
"""

import math
import time
from collections import defaultdict
from collections.abc import Collection, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ngd_dist.config import NGDConfig
from ngd_dist.covered import CoveredLayers, kind_of
from ngd_dist.factors.caches import Caches
from ngd_dist.layers import LayerBatch
from ngd_dist.layers.stacked_batch import StackedBatch, stacking_key
from ngd_dist.statistics.statistic import Key, Positions, StatisticSpec, by_layer

__all__ = ["Estimates"]

# The most numbers in the rows of one layer that is stacked with others, and in the rows that wait for that. Rows that
# are made of more than a cache holds take longer than those of each layer alone.
MAX_STACKED_ROWS, MAX_WAITING = 2**15, 2**18


@dataclass(frozen=True, slots=True)
class _Added:
    """One backward pass of a layer, with the statistics to make of it; see `Estimates.add`."""

    name: str
    batch: LayerBatch
    specs: tuple[StatisticSpec, ...]
    is_first: bool
    weight: float


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
        """Takes the replicates that are under way into the mean and, if noise is measured, into the mean square.

        That of a local statistic is not: the replicates of other ranks are not averaged with it.
        """
        for share, value in self.replicates:
            weighted = value if share == 1.0 else self.spec.form.weighted(value, share)
            if not _is_one(self.factor):
                weighted = self.spec.form.times(weighted, 1 / self.factor)
            self.total = weighted if self.total is None else self.spec.form.plus(self.total, weighted)
            if measures and not self.spec.is_local:
                square = self.spec.form.norm(value, self.num_replicates).square() * share
                self.square = square if self.square is None else self.square + square
        self.count += len(self.replicates)
        self.replicates = []

    def scaled(self, passes: int, shares: int, divisor: int) -> tuple[Tensor | None, Tensor | None]:
        """Returns the mean over `passes` micro-batches, and its mean square.

        shares: the number of micro-batches that share a value, in forms that do. divisor: the loss of each was divided
        by it, and g was not multiplied by it; a second moment has its square.
        """
        if self.total is None or (passes == 1 and shares == 1 and divisor == 1):
            return self.total, self.square
        power = divisor**self.spec.moment if self.spec.reads_gradients else 1
        mean = self.spec.form.mean(self.total, passes, shares, power)
        return mean, None if self.square is None else self.square * (power**2 / passes)


class Estimates:
    """Adds up the estimates of preconditioners, pass by pass. `is_alone`: whether this is the only rank."""

    def __init__(self, layers: CoveredLayers, config: NGDConfig, caches: Caches, *, is_alone: bool) -> None:
        self._layers = layers
        kinds = {name: kind_of(covered) for name, covered in layers.items()}
        numbered = {kind: number for number, kind in enumerate(dict.fromkeys(kinds.values())) if kind is not None}
        self._kinds = {name: numbered.get(kind) for name, kind in kinds.items()}  # None: it is not stacked
        self._loss_parts = config.loss_parts
        self._counts_parts = config.micro_batches == "any"
        self._caches = caches
        self._power = config.power_of_positions
        self._measures = config.measures_noise
        self._halves = config.measures_noise and is_alone and config.loss_parts == 1
        self.clear()

    def forget(self, layer: str) -> None:
        """Forgets the passes of one layer."""
        self.make()
        self._means.pop(layer, None)
        self.passes.pop(layer, None)
        self._rows.pop(layer, None)
        self._positions.pop(layer, None)

    def clear(self) -> None:
        """Forgets the last step."""
        self._waiting: dict[Hashable, list[_Added]] = defaultdict(list)
        self._waiting_layers: set[str] = set()
        self._waiting_numbers = 0
        self._means: dict[str, dict[str, _Mean]] = defaultdict(dict)  # by layer and statistic
        self.passes: dict[str, int] = defaultdict(int)
        self._rows: dict[str, int] = defaultdict(int)
        self._positions: dict[str, list[Positions]] = defaultdict(list)  # of each micro-batch

    def add(self, name: str, batch: LayerBatch, due: frozenset[str], *, is_first: bool, weight: float) -> None:
        """Adds one backward pass of a layer to its due statistics.

        The first pass of a micro-batch counts it, and adds the statistics that read no gradient. A statistic that reads
        gradients is a sum over the passes of a micro-batch, times `weight`.
        """
        specs = self._layers[name].method.statistics
        specs = tuple(spec for spec in specs if spec.name in due and (is_first or spec.reads_gradients))
        if name in self._waiting_layers:
            self.make()
        count = batch.count
        if is_first:
            self._complete(name)
            self.passes[name] += 1
            self._rows[name] += count
        added = _Added(name, batch, specs, is_first, weight)
        kind, numbers = self._kinds[name], count * self._layers[name].layer.shape.row_numbers
        key = None if kind is None or numbers > MAX_STACKED_ROWS else stacking_key(batch)
        if key is None:
            self._make([added])
            return
        self._waiting[kind, key, due, is_first, weight].append(added)
        self._waiting_layers.add(name)
        self._waiting_numbers += numbers
        if self._waiting_numbers > MAX_WAITING:
            self.make()

    def make(self) -> None:
        """Makes the statistics of the passes that have been added and wait for others to be stacked with."""
        waiting, self._waiting, self._waiting_numbers = self._waiting, defaultdict(list), 0
        self._waiting_layers.clear()
        for alike in waiting.values():
            self._make(alike)

    def _make(self, alike: Sequence[_Added]) -> None:
        """Makes the statistics of layers that are alike, by one call for each statistic."""
        first, count = alike[0], len(alike)
        method, batch = self._layers[first.name].method, first.batch
        if count > 1:
            batch = StackedBatch([added.batch for added in alike])
        if first.is_first:
            is_mean = any(spec.per_position for spec in first.specs)
            positions = Positions(batch.read, _mean(batch.mean_positions_B) if is_mean else 1.0)
            for added in alike:
                self._positions[added.name].append(positions)
        halves = batch.halves() if self._halves and batch.samples > 1 else (batch,)
        shared = self._caches.shared_of(first.name)
        for spec in first.specs:
            start = time.perf_counter()
            replicates = (batch,) if spec.is_local else halves
            shares = [replicate.samples / batch.samples for replicate in replicates]
            alone, scale = frozenset({spec.name}), first.weight if spec.reads_gradients else 1.0
            with _in_full_precision(batch.device):
                estimates = [method.estimate(part, alone, shared) for part in replicates]
            values = [estimate[spec.name] for estimate in estimates if estimate]  # else there is no basis yet
            scaled = values if scale == 1.0 else [spec.form.weighted(value, scale) for value in values]
            of_layers = zip(*(_parts(value, count) for value in scaled), strict=True) if scaled else [()] * count
            for added, of_layer in zip(alike, of_layers, strict=True):
                mean = self._means[added.name].get(spec.name)
                if mean is None:
                    mean = self._means[added.name][spec.name] = _Mean(spec, replicates[0].replicate.count)
                mean.factor = self._positions[added.name][-1].factor(spec, self._power)
                if of_layer:
                    mean.add(list(zip(shares, of_layer, strict=True)))
                mean.seconds += (time.perf_counter() - start) / count

    def per_position(self, key: Key, value: Tensor) -> Tensor:
        """Returns a statistic of `values`, whole, with the part that positions have in it."""
        spec = self._means[key.layer][key.statistic].spec
        factor = self._mean_positions(key.layer).factor(spec, self._power)
        return spec.form.whole(value if _is_one(factor) else spec.form.times(value, factor))

    def values(self) -> dict[Key, Tensor]:
        """Returns the mean of each statistic over this rank's samples, without the part that positions have in it."""
        return {key: value for layer in self.passes for key, value in self.of(layer).items()}

    def of(self, layer: str) -> dict[Key, Tensor]:
        """Returns those of one layer, over the samples seen so far."""
        self.make()
        self._complete(layer)
        means = ((Key(layer, name), self._scaled(mean, layer)[0]) for name, mean in self._means[layer].items())
        return {key: total for key, total in means if total is not None}

    def seconds(self, key: Key) -> float:
        """Returns the host seconds that estimating the statistic took."""
        mean = self._means.get(key.layer, {}).get(key.statistic)
        return 0.0 if mean is None else mean.seconds

    def counts(
        self, due: Sequence[Key], wrong: Collection[str], device: torch.device, spoiled: Collection[str] = ()
    ) -> Tensor:
        """Returns the numbers of a `CaptureCount` of each due layer, one after the other, as they travel.

        The first is 0 for a layer that was not captured, NaN for the layers in `wrong`, captured too often, and
        infinity for those in `spoiled`.
        """
        known: list[float] = []
        unread: dict[int, Tensor] = {}  # by place: not read back here
        for layer, names in by_layer(due).items():
            means = [self._means.get(layer, {}).get(name) for name in names]
            captured = [mean for mean in means if mean is not None and mean.total is not None]
            first = math.nan if layer in wrong else math.inf if layer in spoiled else float(bool(captured))
            count = max((mean.count for mean in captured), default=0)
            positions = self._mean_positions(layer) if captured else (0.0, 0.0)
            squares = [None if mean is None else self._scaled(mean, layer)[1] for mean in means if self._measures]
            for number in (first, self._rows.get(layer, 0), count, *positions, *squares):
                if isinstance(number, Tensor):  # a square, or the positions of a ragged batch
                    unread[len(known)] = number
                known.append(0.0 if number is None or isinstance(number, Tensor) else number)
        numbers = torch.tensor(known, dtype=torch.float64, device=device)
        if unread:
            numbers[torch.tensor([*unread], device=device)] = torch.stack([*unread.values()]).to(numbers)
        return numbers

    def _scaled(self, mean: _Mean, layer: str) -> tuple[Tensor | None, Tensor | None]:
        passes = self.passes[layer]
        return mean.scaled(passes, self._loss_parts, passes if self._counts_parts else 1)

    def _mean_positions(self, layer: str) -> Positions:
        """Returns the means over this rank's micro-batches of a layer."""
        each = self._positions.get(layer, [Positions()])
        return Positions(sum(p.read for p in each) / len(each), sum(p.layer for p in each) / len(each))

    def _complete(self, layer: str) -> None:
        for mean in self._means[layer].values():
            mean.complete(measures=self._measures)


def _mean(positions_B: Tensor) -> float | Tensor:
    """Returns the mean over blocks, which differ alike in all micro-batches: [] on a device, a number on the CPU."""
    mean = positions_B.mean()
    return float(mean) if mean.device.type == "cpu" else mean


def _parts(value: Tensor, count: int) -> Sequence[Tensor]:
    """Returns equal parts of the value. A view would keep all of it alive for as long as one part is in use."""
    return [value] if count == 1 else [part.clone() for part in value.chunk(count)]


def _in_full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Returns a context for products: if backward runs under autocast, they would be formed in 16 bits."""
    is_lowered = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if is_lowered else nullcontext()


def _is_one(factor: float | Tensor) -> bool:
    return isinstance(factor, float) and factor == 1.0
