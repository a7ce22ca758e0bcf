"""The micro-batches of several layers as one, so that one call makes the statistics of all of them."""

from collections.abc import Hashable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ngd_dist.factors.kronecker import second_moment
from ngd_dist.layers.base import Layer
from ngd_dist.layers.batch import LayerBatch

__all__ = ["StackedBatch", "stacking_key"]


def stacking_key(batch: LayerBatch) -> Hashable | None:
    """Returns the key that batches of layers that are alike have in common if they can be stacked; None if none can.

    Those can't that have several runs, padding or slopes, and those of layers that make moments without rows.
    """
    layer, run = batch._layer, batch._runs[0]
    is_plain = layer.is_stackable and type(layer).input_moment is Layer.input_moment and type(batch) is LayerBatch
    if not is_plain or len(batch._runs) > 1 or batch._ignores or batch._counted is not None or run.g is None:
        return None
    if run.slope is not None or run.samples == 1:
        return None
    shapes = run.kept.shape, run.kept.dtype, run.g.shape, run.g.dtype
    return shapes, run.weight, batch._scale, batch.samples, batch.sharers, batch.read, batch.replicate.index


class StackedBatch(LayerBatch):
    """Batches of one `stacking_key`, of L layers that are alike, as a batch of a layer with L times as many blocks."""

    def __init__(self, batches: Sequence[LayerBatch]) -> None:
        first = batches[0]
        super().__init__(first._layer, first._runs, first._scale, first.replicate, read=first.read)
        self._of_layers = [batch._runs[0] for batch in batches]

    @cached_property
    def a_BNPI(self) -> Tensor:
        return self._apart(self._layer.inputs(self._kept))

    @cached_property
    def g_BNPO(self) -> Tensor:
        g = torch.cat([run.g for run in self._of_layers if run.g is not None], dim=self._layer.batch_dim)
        return self._apart(self._layer.output_gradients(self._kept, g)) * (self._scale * self._of_layers[0].weight)

    @cached_property
    def positions_B(self) -> Tensor:
        of_one = super().positions_B
        return of_one if len(of_one) == 1 else of_one.repeat(len(self._of_layers))

    @property
    def input_moment_BII(self) -> Tensor:
        return second_moment(self.a_BNPI, 1.0)

    def halves(self) -> tuple[LayerBatch, LayerBatch]:
        assert self.a_BNPI is not None  # made before, for the halves to be views of them
        return super().halves()

    @cached_property
    def _kept(self) -> Tensor:
        # A row depends on its own sample alone: the samples of all layers may be taken for those of one.
        return torch.cat([run.kept for run in self._of_layers], dim=self._layer.batch_dim)

    def _apart(self, rows_BMPD: Tensor) -> Tensor:
        """Returns [L B, N, P, D] from the rows of all layers' samples."""
        layers: Tensor = rows_BMPD.unflatten(1, (len(self._of_layers), self.samples, -1)).flatten(3, 4)
        return layers.transpose(0, 1).flatten(0, 1)
