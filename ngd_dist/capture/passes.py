"""The backward passes of a layer since the last step, and the runs of the layer that each of them came through.

A pass belongs to the step if its gradients are in the parameters' `grad`: it has added to `grad`, which was not cleared
since. So probes that differentiate with respect to inputs (saliency, adversarial examples, penalties) count for
nothing, and a loop that sets `grad` to the result of `torch.autograd.grad` is understood too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from ngd_dist.capture.batches import Batch
from ngd_dist.errors import CaptureError
from ngd_dist.layers import Layer, Run
from ngd_dist.layers.hooks import OUTSIDE_BACKWARD

__all__ = ["PARTS_OF_ONE_LOSS", "Arrivals", "LayerPasses", "MicroBatch", "NotedRun", "miscount", "size_of"]

# The warning with a layer's name and its number of passes.
PARTS_OF_ONE_LOSS = (
    "layer %r had %d backward passes in one step: they count as parts of one loss on the same samples. If they are "
    "gradient accumulation, set micro_batches"
)


@dataclass(slots=True, eq=False, kw_only=True)
class NotedRun(Run):
    """A run, and the forward pass that it is part of.

    `size`: the length of its input's batch dimension, which may count parts of samples. `within`: the backward pass in
    which it ran again (activation checkpointing), or OUTSIDE_BACKWARD.
    """

    size: int
    batch: Batch
    within: int = OUTSIDE_BACKWARD

    @property
    def is_recomputed(self) -> bool:
        """Whether it ran again in backward."""
        return self.within != OUTSIDE_BACKWARD

    def with_gradient(self, layer: str, g: Tensor) -> "NotedRun":
        """Returns the run with its gradient, and with the samples that its batch decides. Raises: CaptureError."""
        samples, sharers = self.batch.of_run(layer, self.size)
        return NotedRun(
            self.kept, samples, sharers, g=g, slope=self.slope, size=self.size, batch=self.batch, within=self.within
        )


# The gradient is None if the pass counts but is not measured: the Fisher has its own passes.
Arrivals = list[tuple[NotedRun, Tensor | None]]


@dataclass(slots=True)
class MicroBatch:
    """Runs of a layer that belong together, with the sum of the gradients that the passes through them have given.

    `within`: the backward passes in which they ran again; a reentrant checkpoint has a pass of its own inside of those.
    """

    gradients: dict[NotedRun, Tensor | None] = field(default_factory=dict)
    is_closed: bool = False
    within: set[int] = field(default_factory=set)

    def add(self, arrivals: Arrivals) -> None:
        """Adds one pass."""
        for run, g in arrivals:
            old = self.gradients.get(run)
            self.gradients[run] = g if old is None or g is None else old + g

    def close(self) -> Arrivals:
        """Returns the runs with their gradients, and keeps none of them."""
        arrivals, self.gradients = list(self.gradients.items()), {}
        self.is_closed = True
        return arrivals


@dataclass(slots=True)
class LayerPasses:
    """The passes of one layer. `adds_up`: whether all passes of a step are parts of one loss on one micro-batch.

    `ended` counts the passes that left no graph for another one to come through.
    """

    adds_up: bool
    micro_batches: list[MicroBatch] = field(default_factory=list)
    ended: int = 0
    _added: tuple[nn.Parameter, int] | None = None
    _arriving: dict[int, Arrivals] = field(default_factory=dict)
    _returned: dict[int, Arrivals] = field(default_factory=dict)

    def arrive(self, task: int, run: NotedRun, g: Tensor | None, *, is_returned: bool) -> None:
        """Takes the gradient of one run, in a backward pass that will add to `grad`, or returns its gradients."""
        passes = self._returned if is_returned else self._arriving
        if task not in passes and is_returned:
            # If several passes returned gradients, the loop can only have set those of one forward pass.
            self._returned = passes = {t: runs for t, runs in passes.items() if any(run is r for r, _ in runs)}
        elif task not in passes and not run.is_recomputed:
            passes.clear()  # those that were broken off; a reentrant pass is inside of another, which goes on
        passes.setdefault(task, []).append((run, g))

    def is_cleared(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Returns whether the gradients in `grad` are gone: set to None, or to zeros in place.

        Reads a number from the device if a `grad` was written to since.
        """
        if not self.micro_batches:
            return False
        if all(p.grad is None for p in parameters):
            return True
        if self._added is None:
            return False
        parameter, version = self._added
        is_written = parameter.grad is not None and parameter.grad._version != version
        return is_written and not bool(parameter.grad.any())  # type: ignore[union-attr]

    def confirm(self, task: int, parameter: nn.Parameter, *, keeps_graph: bool) -> MicroBatch | None:
        """Returns the micro-batch that the pass has come through, now that it has added to `grad`; None if to none.

        A closed one is returned as it is.
        """
        if self._added is not None and self._added[0] is parameter:
            self._added = (parameter, _version_of(parameter))
        arrivals = self._arriving.pop(task, None)
        if not arrivals:
            return None
        self._added = (parameter, _version_of(parameter))
        self.ended += not keeps_graph
        for run, _ in arrivals:
            run.batch.confirm(None if run.is_recomputed else task)
        return self._place(arrivals)

    def adopt(self) -> None:
        """Counts the newest passes that returned their gradients as those of the step: the loop has set `grad`."""
        for task, arrivals in self._returned.items():
            self.ended += 1
            self._place(arrivals)
            for run, _ in arrivals:
                run.batch.confirm(task)
        self._returned.clear()

    def forget(self) -> None:
        """Forgets the passes that have added to `grad`: it was cleared."""
        self.micro_batches.clear()
        self.ended, self._added = 0, None

    def _place(self, arrivals: Arrivals) -> MicroBatch:
        micro = self._of(arrivals)
        if not micro.is_closed:
            micro.add(arrivals)
        return micro

    def _of(self, arrivals: Arrivals) -> MicroBatch:
        for micro in self.micro_batches:
            if self.adds_up or any(run in micro.gradients or run.within in micro.within for run, _ in arrivals):
                return micro
        within = {run.within for run, _ in arrivals if run.is_recomputed}
        self.micro_batches.append(MicroBatch(within=within))
        return self.micro_batches[-1]


def size_of(layer: Layer, x: Tensor) -> int:
    """Returns the length of the batch dimension of a layer's input. Raises: CaptureError for an unfit or empty one."""
    expected = layer.expected_input(x)
    if expected is not None:
        raise CaptureError(f"layer {layer.name!r} needs an input of shape {expected}, got {list(x.shape)}")
    size = x.shape[layer.batch_dim] if x.ndim > layer.batch_dim else 0
    if size == 0:
        raise CaptureError(f"layer {layer.name!r} is given no samples; leave an empty batch out on all ranks")
    return size


def _version_of(parameter: nn.Parameter) -> int:
    """Returns a number that changes with every write to the parameter's `grad`."""
    return -1 if parameter.grad is None else parameter.grad._version


def miscount(layer: str, count: int | None, allowed: int | str, *, is_fisher: bool) -> CaptureError:
    """Returns the error for a layer with more micro-batches than are allowed. count: None if another rank had them."""
    times = f"{count} times" if count else "too often on another rank"
    if is_fisher:
        return CaptureError(
            f"fisher_backward was called {times} in one optimizer step, but micro_batches is {allowed}: call it "
            "once per micro-batch, with a tuple of the outputs if there are several; where the loss is divided by "
            "the number of calls, set micro_batches to it"
        )
    return CaptureError(
        f"layer {layer!r} was differentiated {times} in one optimizer step, through a forward pass of its own each "
        f"time, but micro_batches is {allowed}. If the loss of each is divided by their number, set micro_batches "
        "to it, or to 'any'; add up losses on the same samples, and differentiate the sum; put passes that are not "
        "the step's own into `with optimizer.paused():`; a module that runs in several checkpointed blocks needs "
        "use_reentrant=False; if an engine has skipped steps, call optimizer.skip() after each"
    )
