"""Which backward passes a layer has had since the last step, and which of its runs each of them came through.

A pass belongs to the step if what it computes is in the parameters' `grad`: it has added to them, and nobody has
cleared them since. So probes that differentiate with respect to inputs (saliency, adversarial examples, penalties)
count for nothing, and whoever sets `grad` to what `torch.autograd.grad` returned is understood too.
"""

from dataclasses import dataclass, field, replace

from torch import Tensor

from ngd_dist.batches import Batch
from ngd_dist.layers import Run

__all__ = ["Arrivals", "LayerPasses", "MicroBatch", "NotedRun"]


@dataclass(slots=True, eq=False, kw_only=True)
class NotedRun(Run):
    """A run, the forward pass that it is part of, and whether it ran again in backward (activation checkpointing).

    `size`: the length of its input's batch dimension, which may count parts of samples.
    """

    size: int
    batch: Batch
    is_recomputed: bool

    def with_gradient(self, layer: str, g: Tensor) -> "NotedRun":
        """Returns the run with its gradient, and with what of it the batch decides. Raises: CaptureError."""
        samples, sharers = self.batch.of_run(layer, self.size)
        return replace(self, g=g, samples=samples, sharers=sharers)


Arrivals = list[tuple[NotedRun, Tensor]]


@dataclass(slots=True)
class MicroBatch:
    """Runs of a layer that belong together, with the sum of the gradients that the passes through them have given."""

    gradients: dict[NotedRun, Tensor] = field(default_factory=dict)
    is_closed: bool = False

    def add(self, arrivals: Arrivals) -> None:
        """Adds one pass."""
        for run, g in arrivals:
            old = self.gradients.get(run)
            self.gradients[run] = g if old is None else old + g

    def close(self) -> Arrivals:
        """Returns the runs with their gradients, and keeps none of them."""
        arrivals, self.gradients = list(self.gradients.items()), {}
        self.is_closed = True
        return arrivals


@dataclass(slots=True)
class LayerPasses:
    """One layer's. `adds_up`: whether all passes of a step are parts of one loss on one micro-batch.

    `ended` counts the passes that left no graph for another one to come through.
    """

    adds_up: bool
    micro_batches: list[MicroBatch] = field(default_factory=list)
    ended: int = 0
    _arriving: dict[int, Arrivals] = field(default_factory=dict)
    _returned: dict[int, Arrivals] = field(default_factory=dict)

    def arrive(self, task: int, run: NotedRun, g: Tensor, *, is_returned: bool) -> None:
        """Takes the gradient of one run, in a backward pass that will add to `grad`, or returns its gradients."""
        passes = self._returned if is_returned else self._arriving
        if not (is_returned or run.is_recomputed) and task not in passes:
            passes.clear()  # of passes that were broken off; a reentrant one is inside of another, which goes on
        passes.setdefault(task, []).append((run, g))

    def confirm(self, task: int, *, keeps_graph: bool) -> MicroBatch | None:
        """Returns the micro-batch that the pass has come through, now that it has added to `grad`; None if to none.

        A closed one is returned as it is.
        """
        arrivals = self._arriving.pop(task, None)
        if not arrivals:
            return None
        self.ended += not keeps_graph
        return self._place(arrivals)

    def adopt(self) -> None:
        """Takes the passes that returned their gradients for the step's own: `grad` was set from somewhere."""
        for arrivals in self._returned.values():
            self.ended += 1
            self._place(arrivals)
        self._returned.clear()

    def forget(self) -> None:
        """Forgets what has been added to `grad`: it was cleared."""
        self.micro_batches.clear()
        self.ended = 0

    def _place(self, arrivals: Arrivals) -> MicroBatch:
        micro = self._of(arrivals)
        if not micro.is_closed:
            micro.add(arrivals)
        return micro

    def _of(self, arrivals: Arrivals) -> MicroBatch:
        for micro in self.micro_batches:
            if self.adds_up or any(run in micro.gradients for run, _ in arrivals):
                return micro
        self.micro_batches.append(MicroBatch())
        return self.micro_batches[-1]
