"""Turns the runs of a layer, once their gradients have come, into statistics and kept rows."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from ngd_dist.capture.estimates import Estimates
from ngd_dist.capture.loss_scale import LossScale
from ngd_dist.capture.part import samples_in_part
from ngd_dist.capture.passes import Arrivals, NotedRun
from ngd_dist.config import LayerWise, NGDConfig
from ngd_dist.covered import CoveredLayers, layers_with_few_rows
from ngd_dist.distributed.comm import Communicator
from ngd_dist.errors import CaptureError
from ngd_dist.factors.caches import Caches
from ngd_dist.layers import LayerBatch, Replicate
from ngd_dist.preconditioners import check_rows
from ngd_dist.statistics.statistic import Key, by_layer
from ngd_dist.telemetry import Stopwatch

__all__ = ["Measurement", "Pass", "Sink", "Source"]


class Source(Enum):
    """The source of the gradients of statistics."""

    LOSS = "the training loss"
    FISHER = "labels drawn from the model, or all of them"


@dataclass(frozen=True, slots=True)
class Pass:
    """One backward pass: of the loss, or one of those that make up the Fisher of a micro-batch, with its weight.

    `scale`: the factor on its gradients; None for those of the loss, where it follows from the batch.
    `ignores`: whether its gradients are 0 at positions that the loss ignores. `read`: see `LayerBatch`.
    `counted`: by layer, the rows that count, if these gradients alone don't tell.
    """

    source: Source
    is_first: bool = True
    weight: float = 1.0
    scale: float | None = None
    ignores: bool = False
    read: float = 1.0
    counted: Mapping[str, Tensor | None] = field(default_factory=dict)


class Sink(Protocol):
    """Takes each statistic of a layer as soon as this rank has it, and may begin to send it."""

    def offer(self, key: Key, value: Tensor) -> None: ...


class Measurement:
    """The statistics of one step as this rank measures them. `Capture` describes the arguments.

    `due`: by layer, the names of the due statistics. `spoiled`: the layers with useless statistics, because values have
    left this rank, or have lost their rows, before it was known that they would change.
    """

    def __init__(
        self,
        layers: CoveredLayers,
        config: NGDConfig,
        comm: Communicator,
        *,
        caches: Caches,
        loss_scale: LossScale,
        sink: Sink | None,
        stopwatch: Stopwatch,
    ) -> None:
        self.estimates = Estimates(layers, config, caches, is_alone=comm.world_size == 1)
        self.keeps_rows = isinstance(config.length, LayerWise)
        self._layers = layers
        self._config = config
        self._comm = comm
        self._replicates = comm.world_size * config.loss_parts
        self._with_few_rows = layers_with_few_rows(layers, config, comm.world_size)
        check_rows(config, self._replicates)
        # g of a mean over P positions times sqrt(P): the mean over positions of g g^T is then that of their own losses.
        self._averages = config.averages_positions
        self._loss_scale = loss_scale
        self._sink = sink
        self._stopwatch = stopwatch
        self.begin([], 0)

    def begin(self, due: Sequence[Key], step: int) -> None:
        """Starts a new step."""
        self._step = step
        self.estimates.clear()
        self.layer_batches: dict[str, list[LayerBatch]] = {}
        self.spoiled: set[str] = set()
        self._handed_over: set[str] = set()
        self.due = {layer: frozenset(names) for layer, names in by_layer(due).items()}
        reads = any(
            spec.reads_gradients
            for layer, names in self.due.items()
            for spec in self._layers[layer].method.statistics
            if spec.name in names
        )
        # Statistics of the forward pass alone need no Fisher pass.
        self.source = Source.FISHER if reads and self._config.fisher.kind != "empirical" else Source.LOSS

    @property
    def measures_loss(self) -> bool:
        """Whether the passes of the loss itself are measured."""
        return self.keeps_rows or self.source is Source.LOSS

    def check(self, name: str, run: NotedRun) -> None:
        """Returns if the samples of a run can be told. Raises: CaptureError."""
        with self.told():
            run.batch.of_run(name, run.size)

    @torch.no_grad()
    def close(self, name: str, arrivals: Arrivals) -> None:
        """Takes a micro-batch of the loss that is complete. Raises: CaptureError."""
        runs = self._with_gradients(name, arrivals)
        scale, ignores, read = self.scale(runs[0].samples * runs[0].sharers), False, 1.0
        for run in runs:
            positions, ignores_some = run.batch.positions()
            run.weight, ignores = positions**0.5 if self._averages else 1.0, ignores or ignores_some
            read = max(read, positions)
        if self.keeps_rows:
            # Apart from the rows of the statistics, which keep all tensors that were made of the runs.
            kept = [replace(run, slope=None) for run in runs]
            batch = self._layer_batch(name, kept, Pass(Source.LOSS, scale=scale, ignores=ignores, read=read))
            self.layer_batches.setdefault(name, []).append(batch)
        if self.source is Source.LOSS and name in self.due:
            part = samples_in_part(runs[0].samples, self._config.statistics_fraction)
            self._estimate(name, runs, Pass(Source.LOSS, scale=scale, ignores=ignores, read=read), part)
            if self.estimates.passes[name] == self._config.micro_batches:
                self.hand_over(name)

    @torch.no_grad()
    def add_fisher(self, name: str, arrivals: Arrivals, origin: Pass) -> None:
        """Takes one Fisher pass. Raises: CaptureError."""
        for run, _ in arrivals:
            self.check(name, run)
        self._estimate(name, self._with_gradients(name, arrivals), origin)

    def counted(self, name: str, arrivals: Arrivals) -> Tensor | None:
        """Returns the rows of the layer that these gradients reach, [B, N, P]. Raises: CaptureError."""
        runs = self._with_gradients(name, arrivals)
        return self._layer_batch(name, runs, Pass(Source.FISHER, scale=1.0, ignores=True)).counted_BNP

    def forget(self, name: str) -> None:
        """Forgets the passes of one layer."""
        self.estimates.forget(name)
        self.layer_batches.pop(name, None)
        self.spoiled.discard(name)
        if name in self._handed_over:  # a value that has left can't be taken back
            self.spoiled.add(name)

    def hand_over(self, name: str) -> None:
        """Offers the due statistics of a layer to the sink: no more passes are expected."""
        if self._sink is not None and self._comm.world_size > 1:
            self._handed_over.add(name)
            self.make()
            for key, value in self.estimates.of(name).items():
                self._sink.offer(key, value)

    def make(self) -> None:
        """Makes the statistics of passes that wait for others to be stacked with: no more will come."""
        with self._stopwatch.phase("capture"):
            self.estimates.make()

    def scale(self, samples: int) -> float:
        """Returns the factor that turns the gradient of the loss into that of one sample's own loss."""
        # A mean over N samples, divided by the number of micro-batches, makes each g that much smaller.
        mean = samples * self._config.loss_parts if self._config.loss_reduction == "mean" else 1
        return mean / self._loss_scale.factor()

    @contextmanager
    def told(self) -> Iterator[None]:
        """Tells the other ranks of a CaptureError inside the block."""
        try:
            yield
        except CaptureError as error:
            self._comm.post_error(str(error))
            raise

    def error(self, message: str) -> CaptureError:
        """Returns the error, and tells the other ranks."""
        self._comm.post_error(message)
        return CaptureError(message)

    def _with_gradients(self, name: str, arrivals: Arrivals) -> list[NotedRun]:
        """Returns the runs with their gradients. Raises: CaptureError if their batches have several sizes."""
        runs = [run.with_gradient(name, g) for run, g in arrivals if g is not None]
        sizes = sorted({run.samples * run.sharers for run in runs})
        if len(sizes) > 1:
            raise self.error(
                f"layer {name!r} was run on batches of {sizes} samples for one loss; use batches of one size, put "
                "passes outside the loss into `with optimizer.paused():`, or set micro_batches if the loss of each is "
                "divided by their number"
            )
        return runs

    def _layer_batch(self, name: str, runs: Sequence[NotedRun], origin: Pass) -> LayerBatch:
        assert origin.scale is not None
        # A run that all N samples share gets the sum of their gradients. Its square over N stands in for the mean of
        # the squares: unbiased if gradients have zero mean, as those of a sampled Fisher do.
        scale = origin.scale / runs[0].sharers ** 0.5
        layer, part = self._layers[name].layer, self._replicate(name)
        counted = origin.counted.get(name)
        return LayerBatch(layer, runs, scale, part, ignores=origin.ignores, counted=counted, read=origin.read)

    def _estimate(self, name: str, runs: Sequence[NotedRun], origin: Pass, part: range | None = None) -> None:
        batch = self._layer_batch(name, runs, origin)
        batch = batch if part is None else batch.of(part)
        with self._stopwatch.phase("capture"):
            self.estimates.add(name, batch, self.due[name], is_first=origin.is_first, weight=origin.weight)

    def _replicate(self, name: str) -> Replicate:
        """Returns the next micro-batch's part of the global batch; too many are an error of the step."""
        loss_parts = self._config.loss_parts
        index = self._comm.rank * loss_parts + self.estimates.passes.get(name, 0) % loss_parts
        seed = self._step * self._replicates + index
        return Replicate(index, self._replicates, seed, is_all=name in self._with_few_rows)
