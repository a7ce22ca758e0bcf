"""Hooks that turn what a covered layer sees into statistics, only for layers that have one due.

A forward hook notes each run of a layer and puts a hook on its output; when the output's gradient arrives, the two
meet and become statistics. So a forward pass without gradient, one that is never differentiated, and the second
forward pass of activation checkpointing count for nothing. Hooks sit on the output tensor because module backward
hooks break under an in-place activation that follows (pytorch/pytorch#61519).

A layer may run several times in one forward pass (shared modules, siamese batches): the runs of one backward pass
belong together, and count as positions. Backward passes are told apart by autograd's own number for them.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ngd_dist.activations import Activations
from ngd_dist.comm import Communicator
from ngd_dist.config import NGDConfig
from ngd_dist.errors import CaptureError
from ngd_dist.estimates import Estimates
from ngd_dist.hooks import OUTSIDE_BACKWARD, backward_task, remove, tensors_in, uncompiled
from ngd_dist.layers import Layer, OnRun, Replicate, Rows, Run
from ngd_dist.preconditioners import Cache, Preconditioner, check_rows
from ngd_dist.statistics import Key
from ngd_dist.telemetry import Stopwatch

__all__ = ["Capture"]


class Source(Enum):
    """Whose gradients statistics are made of."""

    LOSS = "the training loss"
    FISHER = "labels drawn from the model, or all of them"


@dataclass(frozen=True, slots=True)
class _Pass:
    """One backward pass: of the loss, or one of those that make up the Fisher of a micro-batch, with its weight.

    `scale` is what its gradients are multiplied by; None for those of the loss, where it follows from the batch.
    """

    source: Source
    is_first: bool = True
    weight: float = 1.0
    scale: float | None = None


LOSS_PASS = _Pass(Source.LOSS)


@dataclass(slots=True)
class _Micro:
    """What one layer has seen of the micro-batch that is under way."""

    forward_runs: int = 0
    is_differentiated: bool = False
    task: int = OUTSIDE_BACKWARD
    arrived: list[Run] = field(default_factory=list)


class Capture:
    """Collects the due statistics of one optimizer step over its micro-batches, as means over this rank's samples.

    `keeps_rows`: whether the rows of the loss's own backward pass are kept until the next `arm`. `shared_of`: the cache
    entries of a layer that every rank has. `loss_scale`: what the loss is multiplied by before it is differentiated.
    `on_ready` is given each statistic as soon as the passes that it is made of are over, as a rule while the backward
    pass is still running.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        preconditioners: Mapping[str, Preconditioner],
        config: NGDConfig,
        *,
        comm: Communicator,
        keeps_rows: bool,
        shared_of: Callable[[str], Cache],
        loss_scale: Callable[[], float],
        on_ready: Callable[[Key, Tensor], None],
        stopwatch: Stopwatch,
    ) -> None:
        self.estimates = Estimates(preconditioners, config, shared_of, is_alone=comm.world_size == 1)
        self._on_ready = on_ready
        self._layers = {layer.name: layer for layer in layers}
        self._preconditioners = preconditioners
        self._config = config
        self._comm = comm
        self._replicates = comm.world_size * config.micro_batches
        check_rows(config, self._replicates)
        self._keeps_rows = keeps_rows
        self._loss_scale = loss_scale
        self._stopwatch = stopwatch
        self._samples: int | None = None
        self._is_paused = False
        self._pass = LOSS_PASS
        self._edges: list[GradientEdge] = []
        self._fisher_passes = self._pending_passes = 0
        self._has_run = False
        self._clear([], 0)
        reads_slopes = any(preconditioner.reads_slopes for preconditioner in preconditioners.values())
        self._activations = Activations(model) if reads_slopes else None
        own = weakref.ref(self)
        handles = [model.register_forward_pre_hook(_note_model(own, model), with_kwargs=True)]
        handles += [handle for layer in layers for handle in layer.watch(_note_run(own, layer))]
        weakref.finalize(self, remove, handles)

    def arm(self, due: Sequence[Key], step: int) -> None:
        """Starts a new step in which these statistics, and no others, are captured."""
        self._clear(due, step)

    def take(self) -> dict[Key, Tensor]:
        """Returns what was captured since `arm`. Layers that did not run, or not once per micro-batch, are absent."""
        self._finish_all()
        wrong = self.miscounted()
        return {key: value for key, value in self.estimates.values().items() if key.layer not in wrong}

    def rows(self, layer: str) -> list[Rows]:
        """Returns the rows of the layer's micro-batches, where they are kept."""
        self._finish_all()
        return self._rows.get(layer, [])

    def miscounted(self) -> dict[str, int]:
        """Returns the layers that were differentiated in another number of backward passes than micro-batches."""
        wanted = self._config.micro_batches
        return {layer: passes for layer, passes in self.estimates.passes.items() if passes != wanted}

    def miscount(self, layer: str) -> CaptureError:
        """Returns the error for a layer that was differentiated too often, or too rarely, on some rank."""
        here = self.miscounted().get(layer)
        times = f"in {here} backward passes" if here else "too often, or too rarely, on another rank"
        return CaptureError(
            f"layer {layer!r} was differentiated {times} in one optimizer step, but micro_batches is "
            f"{self._config.micro_batches}; set micro_batches to the number of backward passes per "
            "step; a module that runs in several checkpointed blocks needs use_reentrant=False"
        )

    @property
    def activations(self) -> Mapping[str, str | None]:
        """By layer that has run, the type of the activation that read it; empty where no method asks for slopes."""
        return {} if self._activations is None else self._activations.found

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Counts nothing that runs inside the block."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    @property
    def fisher_passes(self) -> int:
        """How many micro-batches of this step have had their Fisher passes."""
        return self._fisher_passes

    @property
    def needs_fisher_pass(self) -> bool:
        """Whether a due statistic reads the Fisher's own gradients."""
        return self._source is Source.FISHER

    def fisher_pass(self, output: Tensor, gradients: Iterable[Tensor], weight: float) -> None:
        """Runs one backward pass per gradient of the output, each in units of a sample's own loss, to the due layers.

        Statistics that read gradients are summed over the passes, times `weight`. No parameter's gradient is touched:
        autograd stops at the outputs of the layers. Raises: CaptureError if none of them has run.
        """
        if not self._has_run:
            raise self._error(
                "no covered layer has run since the last call; call fisher_backward(output) once after "
                "each forward pass, on what that pass returned, outside torch.no_grad()"
            )
        self._finish_all()
        # As small as the loss's own gradients, which is what a GradScaler has made room for.
        scale = self._scale(output.shape[0])
        for number, gradient in enumerate(gradients):
            self._pass = _Pass(Source.FISHER, number == 0, weight, scale)
            try:
                if not self._edges:
                    break  # none of the layers that are due took part
                torch.autograd.grad(output, self._edges, gradient / scale, retain_graph=True, allow_unused=True)
                self._finish_all()
            finally:
                self._pass = LOSS_PASS
        self._edges, self._has_run, self._pending_passes = [], False, 0
        self._fisher_passes += 1
        if self._source is Source.FISHER and self._fisher_passes == self._config.micro_batches:
            for name in self.estimates.passes:
                self._hand_over(name)

    def on_model(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes how many samples the model is given; called before its forward pass."""
        if self._is_paused or not torch.is_grad_enabled():
            return
        self._pending_passes += backward_task() == OUTSIDE_BACKWARD
        if self._pending_passes > max(2, self._config.micro_batches):
            self._edges.clear()  # of passes that were never differentiated; an edge keeps its graph alive
        first = next(tensors_in((args, kwargs)), None)
        dim = self._config.batch_dim
        if first is not None and first.ndim > dim:
            self._samples = first.shape[dim]

    def on_run(self, layer: Layer, x: Tensor, output: Tensor) -> None:
        """Notes that the layer has run; called by its hook. Raises: CaptureError for an unfit input."""
        if self._is_paused or not (torch.is_grad_enabled() and output.requires_grad):
            return
        self._has_run = True
        is_due = layer.name in self._due
        if not (self._keeps_rows or is_due):
            return
        expected = layer.expected_input(x)
        if expected is not None:
            raise self._error(f"layer {layer.name!r} needs an input of shape {expected}, got {list(x.shape)}")
        with torch.no_grad():
            kept = layer.keep(x.detach(), output.detach())
            run = Run(kept, *self._samples_of(layer, x))
        if self._activations is not None and is_due and self._preconditioners[layer.name].reads_slopes:
            self._activations.expect(layer.name, output, run)
        if backward_task() == OUTSIDE_BACKWARD:  # else it is the second forward pass of activation checkpointing
            micro = self._micros.setdefault(layer.name, _Micro())
            if micro.is_differentiated:
                self._finish(layer.name)
                micro = self._micros[layer.name] = _Micro()
            micro.forward_runs += 1
            if is_due and self._source is Source.FISHER:
                self._edges.append(get_gradient_edge(output))
        output.register_hook(partial(self._on_gradient, layer.name, run))

    @torch.no_grad()
    def _on_gradient(self, name: str, run: Run, g: Tensor) -> None:
        is_source = self._pass.source is self._source and name in self._due
        if not is_source and not (self._keeps_rows and self._pass.source is Source.LOSS):
            return
        micro = self._micros.setdefault(name, _Micro())
        micro.is_differentiated = True
        task = backward_task()
        if micro.task != task:
            self._finish(name)
            micro.task = task
        micro.arrived.append(replace(run, g=g))
        if len(micro.arrived) >= micro.forward_runs:
            self._finish(name)

    def _replicate(self, name: str) -> Replicate:
        """Returns which part of the global batch the layer's next micro-batch is; too many are an error of the step."""
        micro_batches = self._config.micro_batches
        index = self._comm.rank * micro_batches + self.estimates.passes.get(name, 0) % micro_batches
        return Replicate(index, self._replicates, seed=self._step * self._replicates + index)

    def _finish_all(self) -> None:
        for name in list(self._micros):
            self._finish(name)

    @torch.no_grad()
    def _finish(self, name: str) -> None:
        """Turns the runs that have arrived, which are those of one backward pass, into statistics and kept rows."""
        micro = self._micros[name]
        if not micro.arrived:
            return
        runs, micro.arrived = micro.arrived, []
        first = runs[0]
        # What all N samples share gets the sum of their gradients. Its square over N stands in for the mean of the
        # squares: unbiased where gradients have zero mean, as those of a sampled Fisher have.
        scale = self._pass.scale or self._scale(first.samples * first.sharers)
        scale /= first.sharers**0.5
        if self._keeps_rows and self._pass.source is Source.LOSS:
            # Rows of their own: those of the statistics hold on to all that was made of the runs.
            kept = [replace(run, slope=None) for run in runs]
            self._rows.setdefault(name, []).append(Rows(self._layers[name], kept, scale))
        rows = Rows(self._layers[name], runs, scale, self._replicate(name))
        if self._pass.source is self._source and name in self._due:
            # Autocast, where backward runs under it, would form the products in 16 bits.
            with self._stopwatch.phase("capture"), torch.autocast(_device_type(runs), enabled=False):
                self.estimates.add(name, rows, self._due[name], is_first=self._pass.is_first, weight=self._pass.weight)
                # A pass too many makes all ranks give up what was handed over.
                if self._source is Source.LOSS and self.estimates.passes[name] == self._config.micro_batches:
                    self._hand_over(name)

    def _hand_over(self, name: str) -> None:
        for key, value in self.estimates.of(name).items():
            self._on_ready(key, value)

    def _clear(self, due: Sequence[Key], step: int) -> None:
        self._step = step
        self.estimates.clear()
        self._micros: dict[str, _Micro] = {}
        self._rows: dict[str, list[Rows]] = {}
        self._edges = []
        self._has_run = False
        self._fisher_passes = self._pending_passes = 0
        self._due = {layer: frozenset(k.statistic for k in due if k.layer == layer) for layer, _ in due}
        reads = any(
            spec.reads_gradients
            for layer, names in self._due.items()
            for spec in self._preconditioners[layer].statistics
            if spec.name in names
        )
        # What reads the forward pass alone needs no pass of the Fisher's own.
        self._source = Source.FISHER if reads and self._config.fisher.kind != "empirical" else Source.LOSS

    def _samples_of(self, layer: Layer, x: Tensor) -> tuple[int, int]:
        """Returns N and how many samples share a run.

        N is that of the model's input, since the layer's own first dimension may count parts of samples too.
        """
        own = x.shape[layer.batch_dim]
        samples = self._samples or own
        if own == 0:
            raise self._error(f"layer {layer.name!r} is given no samples; leave an empty batch out on all ranks")
        if own == 1:
            return 1, samples
        if own % samples:
            raise self._error(
                f"layer {layer.name!r} is given {own} samples where the model is given {samples}: which rows belong to "
                f"one sample can't be told; set batch_dim=1 if dimension 1 counts samples, or name the layer in exclude"
            )
        return samples, 1

    def _error(self, message: str) -> CaptureError:
        self._comm.post_error(message)
        return CaptureError(message)

    def _scale(self, samples: int) -> float:
        """Returns what makes the gradient of the loss, as it is differentiated, that of one sample's own loss."""
        # A mean over N samples, divided by the number of micro-batches, makes each g that much smaller.
        mean = samples * self._config.micro_batches if self._config.loss_reduction == "mean" else 1
        return mean / self._loss_scale()


def _note_model(capture: "weakref.ref[Capture]", model: nn.Module) -> Callable[..., None]:
    """Returns a hook. The model outlives the optimizer, so that its hooks must not keep the capture alive."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        alive = capture()
        if alive is not None and module is model:
            alive.on_model(args, kwargs)

    return uncompiled(hook)


def _note_run(capture: "weakref.ref[Capture]", layer: Layer) -> OnRun:
    def on_run(x: Tensor, output: Tensor) -> None:
        alive = capture()
        if alive is not None:
            alive.on_run(layer, x, output)

    return uncompiled(on_run)


def _device_type(runs: Sequence[Run]) -> str:
    return next((run.g.device.type for run in runs if run.g is not None), "cpu")
