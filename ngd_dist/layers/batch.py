"""The rows of one micro-batch of one layer.

Shapes: B blocks, N samples, P positions (1 when dense), I inputs (+1 with bias), O outputs.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from ngd_dist.factors.form import Replicate
from ngd_dist.factors.kronecker import second_moment
from ngd_dist.layers.base import Layer
from ngd_dist.layers.run import Run

__all__ = ["LayerBatch"]


class LayerBatch:
    """One micro-batch of one layer: rows are made on first use, so that unread ones cost nothing.

    The runs of a layer in one micro-batch count as positions, and so do windows or frames that the model folds into the
    batch dimension. g is per sample: the gradient of that sample's own loss, with any mean over the batch undone by
    `scale`. If the loss `ignores` some positions (padding), rows with g = 0 throughout, or those that `counted` leaves
    out, have a = 0 too, and are no positions. `read`: the mean number of positions of a sample that the loss reads.
    """

    def __init__(
        self,
        layer: Layer,
        runs: Sequence[Run],
        scale: float,
        replicate: Replicate = Replicate(),  # noqa: B008 - frozen
        *,
        ignores: bool = False,
        counted: Tensor | None = None,
        read: float = 1.0,
    ) -> None:
        self._layer, self._runs, self._scale = layer, runs, scale
        self._ignores, self._counted = ignores, counted
        self.read = read
        self.replicate = replicate
        self.samples, self.sharers = runs[0].samples, runs[0].sharers

    @cached_property
    def a_BNPI(self) -> Tensor:
        a_BNPI = self._cat([self._layer.inputs(run.kept) for run in self._runs])
        if not self._ignores or self._layer.shape.has_one_hot_inputs:
            return a_BNPI
        assert self.counted_BNP is not None
        # Not a product: a at padding may be NaN.
        return a_BNPI.masked_fill(~self.counted_BNP.unsqueeze(-1), 0)

    @cached_property
    def g_BNPO(self) -> Tensor:
        return self._cat(self._gradients) * self._scale

    @cached_property
    def counted_BNP(self) -> Tensor | None:
        """Whether each row counts, if the loss ignores some; None if all do."""
        if self._counted is not None:
            return self._counted
        return self._cat(self._gradients).ne(0).any(-1) if self._ignores else None

    @cached_property
    def slopes_BNPO(self) -> Tensor:
        """Derivatives of the activation that reads the layer's output; 1 if none does. Reads no gradient."""
        if all(run.slope is None for run in self._runs):
            return self.a_BNPI.new_ones(()).expand(*self.a_BNPI.shape[:3], self._layer.shape.outputs)
        return self._cat([self._layer.output_gradients(run.kept, _slope(run)) for run in self._runs])

    @cached_property
    def positions_B(self) -> Tensor:
        """Positions of a sample, [B] or [1], on the CPU: a block may have fewer than there are rows.

        If the loss ignores some, they differ: [B, N], on the rows' device.
        """
        if self._ignores:
            assert self.counted_BNP is not None
            return self.counted_BNP.sum(2).double()
        counts = [
            [p * g.shape[1] / self.samples for p in self._layer.positions(run.kept, g)]
            for run, g in zip(self._runs, self._gradients, strict=True)
        ]
        return torch.tensor(counts, dtype=torch.float64).sum(0)

    @cached_property
    def mean_positions_B(self) -> Tensor:
        """The mean of `positions_B` over the samples of the micro-batch, [B] or [1]; not 0 for one of padding alone.

        Halves of a micro-batch have that of the whole.
        """
        if self.counted_BNP is None:
            return self.positions_B
        return self.counted_BNP.sum((1, 2)).clamp(min=1).double() / self.counted_BNP.shape[1]

    def along(self, direction_BOI: Tensor) -> Tensor:
        """Returns <direction, gradient of the sample's own loss>, [N].

        It goes run by run and keeps no rows: the batches of all layers wait for the step, and a convolution's patches
        are many times its input.
        """
        layer = self._layer
        direction_BOI = direction_BOI.to(layer.dtype)
        per_run = [
            layer.along(layer.inputs(run.kept), g_BNPO, direction_BOI)
            for run, g_BNPO in ((run, self._gradient(run)) for run in self._runs)
        ]
        return torch.stack([inner.view(self.samples, -1).sum(1) for inner in per_run]).sum(0) * self._scale

    @cached_property
    def input_squares_BI(self) -> Tensor:
        """Sum over samples and positions of a^2."""
        return self._layer.input_squares(self.a_BNPI, self.counted_BNP)

    @property
    def count(self) -> int:
        """N P, padding included: the work of estimating a statistic grows with it."""
        return sum(self._layer.rows(run.kept, run.g) for run in self._runs if run.g is not None)

    @property
    def device(self) -> torch.device:
        """The device of its rows."""
        return next(run.g.device for run in self._runs if run.g is not None)

    def halves(self) -> "tuple[LayerBatch, LayerBatch]":
        """Returns the first half of the samples and the rest, as views of these rows, with the positions of all."""
        middle, of = self.samples // 2, self.replicate
        first, second = (Replicate(2 * of.index + half, 2 * of.count, of.seed, of.is_all) for half in (0, 1))
        return _Half(self, range(middle), first), _Half(self, range(middle, self.samples), second)

    def of(self, part: range) -> "LayerBatch":
        """Returns the batch of these samples alone. Work on the others is left out, unless the layer couples samples.

        A run that all samples share stays whole.
        """
        if self.samples == 1 or len(part) == self.samples:
            return self
        runs = [self._of_run(run, part) for run in self._runs]
        parts = [run for run in runs if run is not None]
        if self._counted is not None or len(parts) < len(runs):
            return _Slice(self, part, self.replicate)
        return LayerBatch(self._layer, parts, self._scale, self.replicate, ignores=self._ignores, read=self.read)

    @property
    def input_moment_BII(self) -> Tensor:
        """Sum over samples and positions of a a^T, a new tensor."""
        if "a_BNPI" in vars(self) or self._ignores:
            return second_moment(self.a_BNPI, 1.0)
        return _sum([self._layer.input_moment(run.kept) for run in self._runs])

    @cached_property
    def _gradients(self) -> list[Tensor]:
        return [self._gradient(run) for run in self._runs]

    def _gradient(self, run: Run) -> Tensor:
        assert run.g is not None
        g_BNPO = self._layer.output_gradients(run.kept, run.g)
        return g_BNPO if run.weight == 1.0 else g_BNPO * run.weight

    def _of_run(self, run: Run, part: range) -> Run | None:
        """Returns a run's part; None if only rows can be split."""
        layer, samples = self._layer, self.samples
        kept = layer.some_samples(run.kept, part, samples)
        if kept is None:
            return None
        g, slope = (None if x is None else layer.some_gradients(run.kept, x, part, samples) for x in (run.g, run.slope))
        return replace(run, kept=kept, g=g, slope=slope, samples=len(part))

    def _cat(self, per_run: list[Tensor]) -> Tensor:
        grouped = [rows.reshape(rows.shape[0], self.samples, -1, rows.shape[-1]) for rows in per_run]
        return grouped[0] if len(grouped) == 1 else torch.cat(grouped, dim=2)


class _Slice(LayerBatch):
    """Some of the samples of a batch, as views of its rows."""

    def __init__(self, whole: LayerBatch, part: range, replicate: Replicate) -> None:
        super().__init__(whole._layer, whole._runs, whole._scale, replicate, ignores=whole._ignores, read=whole.read)
        self._whole, self._range = whole, part
        self._slice = slice(part.start, part.stop, part.step)
        self.samples = len(part)

    @property
    def count(self) -> int:
        return self._whole.count * self.samples // self._whole.samples

    @cached_property
    def a_BNPI(self) -> Tensor:
        return self._whole.a_BNPI[:, self._slice]

    @cached_property
    def g_BNPO(self) -> Tensor:
        return self._whole.g_BNPO[:, self._slice]

    @cached_property
    def slopes_BNPO(self) -> Tensor:
        return self._whole.slopes_BNPO[:, self._slice]

    @cached_property
    def counted_BNP(self) -> Tensor | None:
        whole = self._whole.counted_BNP
        return None if whole is None else whole[:, self._slice]

    @cached_property
    def positions_B(self) -> Tensor:
        whole = self._whole.positions_B
        return whole if whole.ndim == 1 else whole[:, self._slice]

    @property
    def input_moment_BII(self) -> Tensor:
        # A slice of a slice, or one of a run that all samples share, has no such part.
        kept = [
            self._layer.some_samples(run.kept, self._range, run.samples) if run.samples == self._whole.samples else None
            for run in self._runs
        ]
        if "a_BNPI" in vars(self._whole) or self._whole._ignores or any(part is None for part in kept):
            return second_moment(self.a_BNPI, 1.0)
        return _sum([self._layer.input_moment(part) for part in kept])


class _Half(_Slice):
    """Half of the samples of a batch, normalised as the whole."""

    @cached_property
    def mean_positions_B(self) -> Tensor:
        return self._whole.mean_positions_B


def _sum(moments: Sequence[Tensor]) -> Tensor:
    """Returns the sum of new tensors, the only one itself: a copy of n x n numbers takes as long as many products."""
    return moments[0] if len(moments) == 1 else torch.stack(list(moments)).sum(0)


def _slope(run: Run) -> Tensor:
    if run.slope is not None:
        return run.slope
    assert run.g is not None
    return torch.ones_like(run.g)
