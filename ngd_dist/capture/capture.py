"""Hooks that record the inputs and output gradients of covered layers, only for layers that have a statistic due.

A forward hook notes each run of a layer and puts a hook on its output. When the output's gradient has come and its
backward pass has added to the parameters' `grad`, the two make statistics (`measurement`). So these count for nothing:
a forward pass without gradient, one that is never differentiated, a pass that leaves `grad` alone, and the second
forward pass of activation checkpointing. Hooks sit on the output tensor because module backward hooks break under an
in-place activation that follows (pytorch/pytorch#61519).

If a layer runs several times in one forward pass (shared modules, siamese batches), the runs of one backward pass
belong together, and count as positions. Backward passes are told apart by autograd's number for them.
"""

import logging
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from ngd_dist.capture.accumulation import Accumulation
from ngd_dist.capture.activations import Activations
from ngd_dist.capture.batches import Batches
from ngd_dist.capture.estimates import Estimates
from ngd_dist.capture.gradient_rows import GradientRows
from ngd_dist.capture.loss_scale import LossScale
from ngd_dist.capture.measurement import Measurement, Pass, Sink, Source
from ngd_dist.capture.part import PartPass
from ngd_dist.capture.passes import PARTS_OF_ONE_LOSS, Arrivals, LayerPasses, NotedRun, miscount, size_of
from ngd_dist.config import NGDConfig
from ngd_dist.covered import CoveredLayers
from ngd_dist.distributed.comm import Communicator
from ngd_dist.engines import Engine
from ngd_dist.errors import CaptureError
from ngd_dist.factors.caches import Caches
from ngd_dist.layers import Layer, LayerBatch, Listener
from ngd_dist.layers.hooks import (
    OUTSIDE_BACKWARD,
    ModuleHook,
    accumulates,
    backward_task,
    is_transformed,
    keeps_graph,
    remove,
    weakly,
)
from ngd_dist.statistics.statistic import Key
from ngd_dist.telemetry import Stopwatch

__all__ = ["Capture"]

logger = logging.getLogger(__name__)

MAX_PENDING = 6  # forward passes that fisher_backward may still be given


class Capture:
    """Collects the due statistics of one optimizer step over its micro-batches, as means over this rank's samples.

    caches: those of the curvature; some statistics are measured in their bases. sink: if there are other ranks, it is
    offered each statistic once that is complete. engine: drives the model. on_forward: is called before each watched
    forward pass of it, and returns whether it has begun the pass itself, maybe with another capture in its place.

    By itself, without an optimizer:

        capture = Capture(model, layers, config)
        capture.begin_step([Key("0", "A"), Key("0", "G")], step=1)
        loss_fn(model(x), y).backward()
        values = capture.take()  # {Key("0", "A"): [1, I, I], Key("0", "G"): [1, O, O]}
    """

    def __init__(
        self,
        model: nn.Module,
        layers: CoveredLayers,
        config: NGDConfig,
        comm: Communicator | None = None,
        *,
        caches: Caches | None = None,
        loss_scale: LossScale | None = None,
        sink: Sink | None = None,
        stopwatch: Stopwatch | None = None,
        engine: Engine | None = None,
        on_forward: Callable[[tuple[Any, ...], Mapping[str, Any]], bool | None] | None = None,
    ) -> None:
        self.batches = Batches(config)
        self.gradient_rows = GradientRows()
        self.measurement = Measurement(
            layers,
            config,
            comm or Communicator(),
            caches=Caches({}) if caches is None else caches,
            loss_scale=loss_scale or LossScale(None),
            sink=sink,
            stopwatch=stopwatch or Stopwatch(),
        )
        self.part = PartPass(model, config)
        self._engine = engine or Engine()
        self._layers = {name: covered.layer for name, covered in layers.items()}
        self._reads_slopes = {name for name, covered in layers.items() if covered.method.reads_slopes}
        self._micro_batches = config.micro_batches
        self._on_forward = on_forward
        self._is_paused = self._has_warned = self._has_run = self._is_stale = False
        # By forward pass. Those that were never differentiated must not pile up, since an edge keeps its graph alive.
        self._edges: deque[list[GradientEdge]] = deque(maxlen=max(MAX_PENDING, config.loss_parts))
        self._passes: dict[str, LayerPasses] = {}
        self._arrived: dict[str, Arrivals] = {}
        # Layers that had a step in which no pass came after one that ended: their rows need not wait for the step.
        self._single: set[str] = set()
        self._clear()
        self._gradient_hook, accumulated = weakly(self._on_gradient), weakly(self._on_accumulated)
        self._accumulation = Accumulation(accumulated)
        self._activations = Activations(model) if self._reads_slopes else None
        handles = [model.register_forward_pre_hook(ModuleHook(weakly(self._note_forward)), with_kwargs=True)]
        on_run, awaits = weakly(self._on_run), weakly(self._awaits)
        for layer in self._layers.values():
            handles += layer.watch(Listener(partial(on_run, layer), partial(awaits, layer)))
        # Last: the model may be a layer itself.
        handles.append(model.register_forward_hook(ModuleHook(weakly(self._note_output)), always_call=True))
        self._finalizer = weakref.finalize(self, _let_go, handles, self._accumulation)

    def begin_step(self, due: Sequence[Key], step: int, with_rows: Collection[str] = ()) -> None:
        """Starts a new step in which these statistics, and no others, are captured, and the rows of some layers."""
        self.measurement.begin(due, step)
        self.gradient_rows.begin(with_rows)
        self._clear()
        if not self.measurement.keeps_rows:
            self._accumulation.keep(self.measurement.due)

    def close(self) -> None:
        """Takes all hooks away."""
        self._finalizer()

    def take(self) -> dict[Key, Tensor]:
        """Returns the statistics captured since `begin_step`, without layers that did not run, or ran too often."""
        return {key: self.estimates.per_position(key, value) for key, value in self.to_send().items()}

    def to_send(self) -> dict[Key, Tensor]:
        """Returns the same as `take`, but as ranks add them up: see `Positions`."""
        self._close_micro_batches()
        self.measurement.make()
        left_out = self.miscounted().keys() | self.measurement.spoiled
        return {key: value for key, value in self.estimates.values().items() if key.layer not in left_out}

    def layer_batches(self, layer: str) -> list[LayerBatch]:
        """Returns the micro-batches of the layer, if their rows are kept."""
        self._close_micro_batches()
        return self.measurement.layer_batches.get(layer, [])

    def miscounted(self) -> dict[str, int]:
        """Returns the layers that have had more micro-batches than the config says."""
        allowed, counts = self._micro_batches, self.estimates.passes.items()
        return {} if allowed == "any" else {layer: count for layer, count in counts if count > allowed}

    def miscount(self, layer: str) -> CaptureError:
        """Returns the error for a layer that has had too many micro-batches on some rank."""
        is_fisher = self.measurement.source is Source.FISHER
        return miscount(layer, self.miscounted().get(layer), self._micro_batches, is_fisher=is_fisher)

    @property
    def estimates(self) -> Estimates:
        """The estimates since `begin_step`."""
        return self.measurement.estimates

    @property
    def activations(self) -> Mapping[str, str | None]:
        """By layer that has run, the type of the activation that read it; empty if no method asks for slopes."""
        return {} if self._activations is None else self._activations.by_layer

    @property
    def is_under_way(self) -> bool:
        """Whether anything has been captured for the step since `begin_step`."""
        return self._fisher_passes > 0 or self.has_gradients

    @property
    def has_gradients(self) -> bool:
        """Whether a backward pass of the loss has counted since `begin_step`."""
        return any(passes.micro_batches for passes in self._passes.values())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Counts nothing that runs inside the block."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    @property
    def fisher_passes(self) -> int:
        """The number of micro-batches of this step that have had their Fisher passes."""
        return self._fisher_passes

    @property
    def needs_fisher_pass(self) -> bool:
        """Whether a due statistic reads gradients of Fisher passes."""
        return self.measurement.source is Source.FISHER

    def begin_fisher(self) -> None:
        """Forgets Fisher passes if gradients were cleared before a loss followed: that batch was given up."""
        if self._is_stale and not self.has_gradients:
            for name in list(self.estimates.passes):
                self.measurement.forget(name)
            self._fisher_passes = 0
        self._is_stale = False

    def fisher_pass(
        self,
        outputs: Sequence[Tensor],
        gradients: Iterable[Sequence[Tensor]],
        origin: Pass,
        probe: Sequence[Tensor] | None = None,
    ) -> None:
        """Runs one backward pass to the due layers for each of `gradients`, in units of a sample's own loss.

        Statistics that read gradients are summed over the passes, times `origin.weight`. No parameter's gradient is
        touched: autograd stops at the outputs of the layers. probe: gradients that are not 0 wherever the loss reads,
        if none of `gradients` is so alone: they tell the rows that count. Raises: CaptureError if no layer has run.
        """
        if not self._has_run:
            raise self.measurement.error(
                "no covered layer has run since the last call; call fisher_backward(output) once after "
                "each forward pass, on the output of that pass, outside torch.no_grad()"
            )
        # As small as the gradients of the loss: a GradScaler has made room for these.
        scale = self.measurement.scale(outputs[0].shape[0])
        edges = [edge for pass_edges in self._edges for edge in pass_edges]
        counted: dict[str, Tensor | None] = {}
        if edges and probe is not None:
            for name, arrivals in self._fisher_arrivals(outputs, edges, probe).items():
                counted[name] = self.measurement.counted(name, arrivals)
        for number, columns in enumerate(gradients):
            if not edges:
                break  # none of the layers that are due took part
            one = replace(origin, is_first=number == 0, scale=scale, counted=counted)
            small = [column / scale for column in columns]
            for name, arrivals in self._fisher_arrivals(outputs, edges, small).items():
                self.measurement.add_fisher(name, arrivals, one)
        self._edges.clear()
        self._has_run, self._fisher_passes = False, self._fisher_passes + 1
        if self.needs_fisher_pass and self._fisher_passes == self._micro_batches:
            for name in self.estimates.passes:
                self.measurement.hand_over(name)

    def _fisher_arrivals(
        self, outputs: Sequence[Tensor], edges: Sequence[GradientEdge], gradients: Sequence[Tensor]
    ) -> dict[str, Arrivals]:
        """Returns the runs of each due layer that these gradients of the outputs reach, with their own."""
        self._is_in_fisher_pass = self.gradient_rows.rests = True
        try:
            torch.autograd.grad(outputs, edges, gradients, retain_graph=True, allow_unused=True)
            return self._arrived
        finally:
            self._arrived, self._is_in_fisher_pass, self.gradient_rows.rests = {}, False, False

    def begin_forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Notes the number of samples in the model's inputs, before its forward pass; runs it on their part first."""
        if self.needs_fisher_pass:
            with self.measurement.told():
                self.part.run(args, kwargs, self.batches)
        self.batches.begin(args, kwargs, counts=True)
        if self.part.has_fisher_passes:
            self._edges.append([])

    def clear(self) -> bool:
        """Returns whether the step had gradients. A Fisher pass that no loss has followed may be given up."""
        self._is_stale = self._fisher_passes > 0
        return self.has_gradients

    def _note_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_blind or not torch.is_grad_enabled():
            self.batches.begin(args, kwargs, counts=False)
        elif backward_task() != OUTSIDE_BACKWARD:  # checkpointed as a whole
            self.batches.begin(args, kwargs, counts=True)
        elif self._on_forward is None or not self._on_forward(args, kwargs):
            self.begin_forward(args, kwargs)

    def _note_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Notes the outputs of the model."""
        due = self.measurement.keeps_rows or bool(self.measurement.due)
        self.batches.end(output, is_watched=self.measurement.measures_loss and due)
        if not self.batches.is_in_call:
            self.part.pair(output)

    def _on_run(self, layer: Layer, x: Tensor, output: Tensor) -> None:
        """Notes that the layer has run; called by its hook. Raises: CaptureError for an unfit input."""
        if not (self._awaits(layer) and torch.is_grad_enabled() and output.requires_grad):
            return
        is_due = layer.name in self.measurement.due
        is_noted = is_due or self.measurement.keeps_rows
        self._has_run = True
        self.gradient_rows.watch(layer, x, output)
        is_trained = any(p.requires_grad for p in layer.parameters)
        if not (is_noted and is_trained) or (layer.replaced() and not self._engine.swaps_parameters):
            return
        within = backward_task()
        batch = self.batches.current(is_recomputed=within != OUTSIDE_BACKWARD)
        with self.measurement.told():
            size = size_of(layer, x)
            batch.check(layer.name, size)
        with torch.no_grad():
            kept = layer.keep(x.detach(), output.detach())
        run = NotedRun(kept, size=size, batch=batch, within=within)
        if self._activations is not None and is_due and layer.name in self._reads_slopes:
            self._activations.expect(layer.name, output, run)
        if is_due and self.needs_fisher_pass and self.part.has_fisher_passes and not run.is_recomputed:
            if not self._edges:
                self._edges.append([])
            self._edges[-1].append(get_gradient_edge(output))
        if not self._engine.swaps_parameters:
            self._accumulation.watch(layer.name, layer.parameters)
        output.register_hook(partial(self._gradient_hook, layer.name, run))

    def _awaits(self, layer: Layer) -> bool:
        """Returns whether a run of the layer is of use now."""
        if self._is_blind or self._is_in_fisher_pass:  # the latter under activation checkpointing
            return False
        is_measured = self.measurement.keeps_rows or layer.name in self.measurement.due
        return is_measured or self.needs_fisher_pass or layer.name in self.gradient_rows.names

    def _on_gradient(self, name: str, run: NotedRun, g: Tensor) -> None:
        """Takes the gradient of a run, if the pass that brings it may count."""
        if self._is_blind:
            return
        is_due = name in self.measurement.due
        if self._is_in_fisher_pass:
            if is_due and self.needs_fisher_pass:
                self._arrived.setdefault(name, []).append((run, g.detach()))
            return
        if not (self.measurement.keeps_rows or is_due):
            return
        parameters = self._layers[name].parameters
        if self._engine.swaps_parameters:  # by now the module holds those that autograd knows
            self._accumulation.watch(name, parameters := self._layers[name].held())
        adds = next((answer for p in parameters if (answer := accumulates(p)) is not False), False)
        if adds is False or (adds is None and g.requires_grad):  # create_graph: a part of a loss that follows
            return
        passes = self._passes.setdefault(name, LayerPasses(self._micro_batches == 1))
        if self._engine.keeps_gradients and passes.is_cleared(parameters):
            passes.forget()
            self.measurement.forget(name)
        self.measurement.check(name, run)
        measured = g.detach() if self.measurement.measures_loss else None
        passes.arrive(backward_task(), run, measured, is_returned=adds is None)
        self.batches.differentiated(run.batch)

    def _on_accumulated(self, name: str, parameter: nn.Parameter) -> None:
        """Counts the pass that is under way as one of the step: it has added to the layer's `grad`.

        Autograd adds once for all uses of a parameter in a pass, so that all runs of the layer have come by now.
        """
        passes = self._passes.get(name)
        if passes is None or self._is_blind:
            return
        keeps = keeps_graph()
        micro = passes.confirm(backward_task(), parameter, keeps_graph=keeps)
        if micro is None or not self.measurement.measures_loss:
            return
        if micro.is_closed:  # its rows are gone: the statistics of both passes together can't be known
            self.measurement.spoiled.add(name)
            self._single.discard(name)
            return
        may_go_on = passes.adds_up or bool(micro.within)  # another pass may bring more to it
        if not (keeps or self.measurement.keeps_rows) and (not may_go_on or name in self._single):
            self.measurement.close(name, micro.close())

    def _close_micro_batches(self) -> None:
        """Makes statistics of all passes that have come; no more will."""
        for name, passes in self._passes.items():
            if not passes.micro_batches and any(p.grad is not None for p in self._layers[name].parameters):
                passes.adopt()
            for micro in passes.micro_batches:
                if self.measurement.measures_loss and not micro.is_closed:
                    self.measurement.close(name, micro.close())
            if passes.micro_batches and passes.ended == len(passes.micro_batches):
                self._single.add(name)
            elif passes.adds_up and passes.ended > 1 and not self._has_warned:
                self._has_warned = True
                logger.warning(PARTS_OF_ONE_LOSS, name, passes.ended)

    def _clear(self) -> None:
        self.batches.forget()
        self._passes, self._arrived, self._is_in_fisher_pass = {}, {}, False
        self._edges.clear()
        self._has_run, self._is_stale, self._fisher_passes = False, False, 0

    @property
    def _is_blind(self) -> bool:
        return self._is_paused or is_transformed()


def _let_go(handles: Iterable[RemovableHandle], accumulation: Accumulation) -> None:
    remove(handles)
    accumulation.keep(())
