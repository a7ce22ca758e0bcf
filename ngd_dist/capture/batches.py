"""The forward passes of a step: the number of samples in each, and the positions of its output that the loss reads.

N is a property of the batch, not of a layer: the first dimension of a layer's input may count windows or tokens. N is
stated (`Batches.stated`), or it is the one size that the model's inputs have in common; if they have several sizes, it
is the one that the outputs share with them. If the model is not called itself, it is the one size of layers' inputs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ngd_dist.config import Categorical, Empirical, NGDConfig
from ngd_dist.errors import CaptureError
from ngd_dist.layers.hooks import backward_task, tensors_in

__all__ = ["Batch", "Batches", "predictions"]

STATE_IT = "state it: `with optimizer.samples(n): ...` around the forward pass"


class Batch:
    """One forward pass. `sizes`: those of its inputs in the sample dimension; empty without a call of the model.

    `is_padded`: whether the loop has said that the loss ignores positions. Its own output need not show it: in a batch
    of translations of one length, only the sources have padding.
    """

    def __init__(self, dim: int, sizes: frozenset[int], stated: int | None = None) -> None:
        self._dim = dim
        self._sizes = sizes
        self._samples = stated
        self._of_layers: set[int] = set()
        self._outputs: frozenset[int] = frozenset()
        self._read: dict[int, Tensor] = {}
        self._arrived: dict[int, dict[int, Tensor]] = {}
        self._positions: tuple[float, bool] | None = None
        self.is_padded = False

    def returned(self, outputs: list[Tensor], class_dim: int, *, is_watched: bool) -> None:
        """Notes the outputs of the model and, if `is_watched`, the positions that get a gradient."""
        self._outputs = frozenset(output.shape[self._dim] for output in outputs if output.ndim > self._dim)
        if not is_watched:
            return
        for index, output in enumerate(outputs):
            if output.requires_grad and self._has_positions(output):
                output.register_hook(partial(self._on_gradient, index, class_dim))

    def confirm(self, task: int | None) -> None:
        """Notes that this backward pass belongs to the step; None: that all passes so far do."""
        for arrived in [self._arrived.pop(t) for t in list(self._arrived) if task in (None, t)]:
            for index, mask in arrived.items():
                self._read[index] = mask | self._read[index] if index in self._read else mask
            self._positions = None

    def check(self, layer: str, size: int) -> None:
        """Returns if a run of the layer with this batch size is valid, or if it is too early to tell.

        Raises: CaptureError.
        """
        if self._samples is not None or len(self._sizes) == 1:
            self.of_run(layer, size)

    def of_run(self, layer: str, size: int) -> tuple[int, int]:
        """Returns N, and the number of samples that share a run of the layer with this batch size.

        Raises: CaptureError if N, or the rows of a sample, can't be told.
        """
        samples = self._sample_count(size)
        if size == 1:
            return 1, samples
        if size % samples:
            raise CaptureError(
                f"layer {layer!r} is given {size} samples where the model is given {samples}: which rows belong to one "
                f"sample can't be told; {STATE_IT}, set batch_dim=1 if dimension 1 counts samples, or name the layer "
                "in exclude"
            )
        return samples, 1

    def positions(self) -> tuple[float, bool]:
        """Returns the mean number of positions of a sample that the loss read, and whether it ignored others.

        One host read per output with positions, in steps that measure.
        """
        if self._positions is None:
            samples = self._samples or 1
            masks = [mask for mask in self._read.values() if mask.numel() > samples]
            counts = [int(mask.sum()) for mask in masks]
            ignores = self.is_padded or any(n < mask.numel() for n, mask in zip(counts, masks, strict=True))
            self._positions = max([1, *counts]) / samples if counts else 1.0, ignores
        return self._positions

    def _has_positions(self, output: Tensor) -> bool:
        """Returns whether it is [N, ..., C] or, with samples and positions in one dimension, [rows, C]."""
        return output.ndim > 2 or (output.ndim == 2 and output.shape[0] not in self._sizes | {self._samples})

    def _on_gradient(self, index: int, class_dim: int, g: Tensor) -> None:
        mask = g.detach().ne(0).any(class_dim if g.ndim > 2 else -1)
        self._arrived.setdefault(backward_task(), {})[index] = mask

    def _sample_count(self, size: int) -> int:
        if self._samples is not None:
            return self._samples
        if not self._sizes:
            return self._of_layer(size)
        sizes = self._sizes if len(self._sizes) == 1 else self._sizes & self._outputs
        if len(sizes) != 1:
            raise CaptureError(
                f"can't tell how many samples the model was given: its inputs have {sorted(self._sizes)} in dimension "
                f"{self._dim}, its outputs {sorted(self._outputs)}; {STATE_IT}"
            )
        (self._samples,) = sizes
        return self._samples

    def _of_layer(self, size: int) -> int:
        """Returns N by the layers' inputs, which must agree: nothing else is known of a pass outside the model."""
        if size == 1:
            return max(self._of_layers, default=1)
        self._of_layers.add(size)
        if len(self._of_layers) > 1:
            raise CaptureError(
                f"can't tell how many samples a pass has that does not call the model itself: its layers are given "
                f"{sorted(self._of_layers)} in dimension {self._dim}; {STATE_IT}"
            )
        return size


class Batches:
    """Assigns the runs of layers to forward passes."""

    def __init__(self, config: NGDConfig) -> None:
        self._dim = config.batch_dim
        fisher = config.fisher
        likelihood = fisher if isinstance(fisher, Empirical) else fisher.likelihood
        self._class_dim = likelihood.class_dim if isinstance(likelihood, Empirical | Categorical) else -1
        self._stated: int | None = None
        self._calls: list[Batch | None] = []
        self._outside: Batch | None = None
        self._latest = Batch(self._dim, frozenset())

    @contextmanager
    def stated(self, samples: int) -> Iterator[None]:
        """States the number of samples of the forward passes inside the block."""
        before, self._stated = self._stated, samples
        self._outside = None
        try:
            yield
        finally:
            self._stated, self._outside = before, None

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, counts: bool) -> None:
        """Begins a call of the model, which may call itself; if it does not `count`, it has no batch."""
        if not counts:
            self._calls.append(None)
            return
        batch = Batch(self._dim, frozenset(self._sizes(args, kwargs)), self._stated)
        self._calls.append(batch)
        self._latest, self._outside = batch, None

    def samples_in(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        """Returns the number of samples in a call's inputs, before it begins. Raises: CaptureError."""
        sizes = self._sizes(args, kwargs) if self._stated is None else {self._stated}
        if len(sizes) != 1:
            raise CaptureError(
                f"statistics_fraction needs the number of samples before the forward pass, and the model's inputs have "
                f"{sorted(sizes)} in dimension {self._dim}; {STATE_IT}"
            )
        return sizes.pop()

    @property
    def is_in_call(self) -> bool:
        """Whether a call of the model is under way."""
        return bool(self._calls)

    def _sizes(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> set[int]:
        sizes = {x.shape[self._dim] for x in tensors_in((args, kwargs)) if x.ndim > self._dim}
        return sizes | {len(value) for value in (*args, *kwargs.values()) if isinstance(value, list)}  # of images, say

    def end(self, output: Any, *, is_watched: bool) -> None:
        """Ends the innermost call of the model. output: None after an error."""
        batch = self._calls.pop() if self._calls else None
        if batch is not None and output is not None:
            batch.returned(predictions(output), self._class_dim, is_watched=is_watched)

    def note_padding(self) -> None:
        """Notes that the loss of the latest pass ignores positions."""
        self._latest.is_padded = True

    def current(self, *, is_recomputed: bool) -> Batch:
        """Returns the pass that a run belongs to: if it is run again in backward, the latest."""
        if is_recomputed:
            return self._latest
        if self._calls and self._calls[-1] is not None:
            return self._calls[-1]
        if self._outside is None:
            self._outside = self._latest = Batch(self._dim, frozenset(), self._stated)
        return self._outside

    def forget(self) -> None:
        """Ends the pass outside the model: no later run belongs to it."""
        self._outside = None

    def differentiated(self, batch: Batch) -> None:
        """Notes that the pass was differentiated: later runs outside the model belong to another one."""
        if batch is self._outside:
            self._outside = None


def predictions(output: Any) -> list[Tensor]:
    """Returns the tensors of a model's result that predict labels.

    If it is a mapping (a dict, a ModelOutput) whose keys name logits, these; else every floating tensor that has a
    dimension for samples, which leaves out a loss beside them.
    """
    if isinstance(output, Mapping):
        named = [value for key, value in output.items() if str(key) == "logits" or str(key).endswith("_logits")]
        output = named or list(output.values())
    return [x for x in tensors_in(output) if x.ndim > 0 and torch.is_floating_point(x)]
