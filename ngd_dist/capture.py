"""Hooks that turn what a covered layer sees into statistics, only for layers that have one due.

A forward hook keeps the input of each run of the module and puts a hook on its output; when the output's gradient
arrives, the two meet and become statistics. So a forward pass without gradient, one that is never differentiated, and
the second forward pass of activation checkpointing count for nothing. Hooks sit on the output tensor because
module backward hooks break under an in-place activation that follows (pytorch/pytorch#61519).
"""

import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ngd_dist.errors import CaptureError
from ngd_dist.layers import Layer, Rows
from ngd_dist.preconditioners import Preconditioner
from ngd_dist.statistics import Key
from ngd_dist.telemetry import Stopwatch

__all__ = ["Capture"]


class Capture:
    """Collects the due statistics of one optimizer step over its micro-batches, as means over this rank's samples."""

    def __init__(
        self,
        layers: Sequence[Layer],
        preconditioners: Mapping[str, Preconditioner],
        *,
        micro_batches: int,
        loss_reduction: str,
        stopwatch: Stopwatch,
    ) -> None:
        self._preconditioners = preconditioners
        self._micro_batches = micro_batches
        self._is_mean = loss_reduction == "mean"
        self._stopwatch = stopwatch
        self._due: dict[str, frozenset[str]] = {}
        self._values: dict[Key, Tensor] = {}
        self._runs: dict[str, int] = {}
        handles = [_watch(layer, weakref.ref(self)) for layer in layers]
        weakref.finalize(self, _remove, handles)

    def arm(self, due: Sequence[Key]) -> None:
        """Starts a new step in which these statistics, and no others, are captured."""
        self._values.clear()
        self._runs.clear()
        self._due = {layer: frozenset(k.statistic for k in due if k.layer == layer) for layer, _ in due}

    def take(self) -> dict[Key, Tensor]:
        """Returns what was captured since `arm`. Layers that did not run, or not once per micro-batch, are absent."""
        wrong = self.miscounted()
        return {key: value for key, value in self._values.items() if key.layer not in wrong}

    def miscounted(self) -> dict[str, int]:
        """Returns the layers that were differentiated another number of times than there are micro-batches."""
        return {layer: runs for layer, runs in self._runs.items() if runs != self._micro_batches}

    def on_forward(self, layer: Layer, x: Tensor, output: Tensor) -> None:
        """Notes that the layer has run; called by its forward hook. Raises: CaptureError for an unfit input."""
        if layer.name in self._due and torch.is_grad_enabled() and output.requires_grad:
            expected = layer.expected_input(x)
            if expected is not None:
                raise CaptureError(f"layer {layer.name!r} needs an input of shape {expected}, got {list(x.shape)}")
            output.register_hook(partial(self._on_backward, layer, x.detach()))

    @torch.no_grad()
    def _on_backward(self, layer: Layer, x: Tensor, g: Tensor) -> None:
        due = self._due.get(layer.name)
        if due is None:
            return
        # Autocast, where backward runs under it, would form the products in 16 bits.
        with self._stopwatch.phase("capture"), torch.autocast(g.device.type, enabled=False):
            # A mean over N samples, divided by the number of micro-batches, makes each g that much smaller.
            scale = float(x.shape[0] * self._micro_batches) if self._is_mean else 1.0
            estimates = self._preconditioners[layer.name].estimate(Rows(layer, x, g, scale), due)
            for name, value in estimates.items():
                key, share = Key(layer.name, name), value / self._micro_batches
                self._values[key] = self._values[key] + share if key in self._values else share
        self._runs[layer.name] = self._runs.get(layer.name, 0) + 1


def _watch(layer: Layer, capture: "weakref.ref[Capture]") -> RemovableHandle:
    """Hooks the layer's module. The model outlives the optimizer, so its hook must not keep the capture alive."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        alive = capture()
        # A deep copy of the model carries this very hook: what the copy sees is not the layer's.
        if alive is not None and module is layer.module:
            alive.on_forward(layer, args[0] if args else kwargs["input"], output)

    return layer.module.register_forward_hook(hook, with_kwargs=True)


def _remove(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
