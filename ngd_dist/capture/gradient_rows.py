"""The rows of a layer of which its gradient is the sum of products, for layers whose directions they make cheaper.

Whether the `grad` of a step is made of these rows is checked when they are used (`step/agreement.py`), so that nothing
here tells passes apart: the rows of a probe, of a penalty, or of a gradient that was cleared or clipped, do no harm.
"""

from collections.abc import Collection, Sequence
from functools import partial

import torch
from torch import Tensor

from ngd_dist.factors.gram import without_underflow
from ngd_dist.layers import Layer
from ngd_dist.layers.hooks import weakly

__all__ = ["GradientRows"]


class GradientRows:
    """Keeps the inputs and output gradients of the layers in `names` from one step to the next.

    A layer that has more rows than it is wide gives none: no direction would be cheaper. `rests`: whether the gradients
    that come are not those of a loss.
    """

    def __init__(self) -> None:
        self.names: Collection[str] = ()
        self.rests = False
        self._runs: dict[str, list[tuple[Layer, Tensor, Tensor]]] = {}
        self._hook = weakly(self._on_gradient)

    def begin(self, names: Collection[str]) -> None:
        """Starts a new step, with the rows of these layers."""
        self.names = names
        self._runs.clear()

    def watch(self, layer: Layer, x: Tensor, output: Tensor) -> None:
        """Takes the input of a run, whose output's gradient may come."""
        # Under autocast `grad` has the errors of 16 bits, and is no sum of these rows.
        if layer.name in self.names and x.dtype == output.dtype == layer.dtype:
            with torch.no_grad():
                kept = layer.keep(x.detach(), output.detach())
            output.register_hook(partial(self._hook, layer, kept))

    def of(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Returns a [B, R, I] and g [B, R, O] of all runs of a layer that have a gradient; None if none has."""
        runs = self._runs.get(name)
        if not runs:
            return None
        a, g = zip(*((layer.inputs(kept), layer.output_gradients(kept, g)) for layer, kept, g in runs), strict=True)
        a_BRI, g_BRO = _side_by_side(a), without_underflow(_side_by_side(g))
        return (a_BRI, g_BRO) if a_BRI.shape[1] == g_BRO.shape[1] <= max(a_BRI.shape[2], g_BRO.shape[2]) else None

    def _on_gradient(self, layer: Layer, kept: Tensor, g: Tensor) -> None:
        if layer.name in self.names and not self.rests:
            self._runs.setdefault(layer.name, []).append((layer, kept, g.detach()))


def _side_by_side(rows: Sequence[Tensor]) -> Tensor:
    flat = [of_run.flatten(1, 2) for of_run in rows]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)
