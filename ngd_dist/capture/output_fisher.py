"""The backward passes of a Fisher other than the empirical one: one per drawn label, or per output."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from ngd_dist.capture.batches import predictions
from ngd_dist.capture.capture import Capture
from ngd_dist.capture.likelihood import anywhere, exact_gradients, outputs_per_sample, positions_read, sampled_gradients
from ngd_dist.capture.measurement import Pass, Source
from ngd_dist.config import Empirical, Exact, MonteCarlo, NGDConfig
from ngd_dist.engines import Engine
from ngd_dist.errors import ConfigError
from ngd_dist.layers.hooks import tensors_in

__all__ = ["OutputFisher"]


class OutputFisher:
    """Feeds `capture` with gradients of the model's own predictions."""

    def __init__(self, config: NGDConfig, capture: Capture, engine: Engine, rank: int) -> None:
        self._choice = config.fisher
        self._capture = capture
        self._engine = engine
        self._rank = rank

    def backward(self, output: Any, step: int, ignored: Tensor | None) -> None:
        """Runs the passes of one micro-batch, if a due statistic needs them. Raises: ConfigError, CaptureError."""
        choice = self._choice
        if ignored is not None:
            self._capture.batches.note_padding()
        if isinstance(choice, Empirical) or not self._capture.needs_fisher_pass:
            return
        with self._engine.beside(tensors_in(output)):
            self._run(choice, output, step, ignored)

    def _run(self, choice: Exact | MonteCarlo, output: Any, step: int, ignored: Tensor | None) -> None:
        self._capture.begin_fisher()
        with self._capture.measurement.told():
            outputs, ignored = self._capture.part.outputs(_differentiable(output), ignored)
        read = None if ignored is None else ~ignored
        per_sample = max(positions_read(choice.likelihood, out, read) for out in outputs)
        origin = Pass(Source.FISHER, ignores=ignored is not None, read=per_sample)
        if isinstance(choice, Exact):
            count = sum(outputs_per_sample(out) for out in outputs)
            if count > choice.max_outputs:
                raise ConfigError(
                    f"the exact Fisher takes one backward pass per output of a sample: {count}, but max_outputs is "
                    f"{choice.max_outputs}; raise it, or take fisher monte_carlo"
                )
            columns = self._columns(choice, outputs, read)
            # A column reaches the rows of one position.
            probe = None if ignored is None else [anywhere(choice.likelihood, out, ~ignored) for out in outputs]
            self._capture.fisher_pass(outputs, columns, origin, probe)
            return
        # A function of step, rank and micro-batch alone, so that a resumed run draws the same as an unbroken one.
        place = f"{choice.seed} {step} {self._rank} {self._capture.fisher_passes}"
        generator = torch.Generator(outputs[0].device).manual_seed(_seed(place))
        # The labels of several outputs are independent, so that one pass serves them all.
        draws = (
            [sampled_gradients(choice.likelihood, out, generator, choice.positions, read) for out in outputs]
            for _ in range(choice.samples)
        )
        self._capture.fisher_pass(outputs, draws, replace(origin, weight=1 / choice.samples))

    def _columns(self, choice: Exact, outputs: Sequence[Tensor], read: Tensor | None) -> Iterator[list[Tensor]]:
        """Yields the columns of each output, with zeros for the others."""
        for index, output in enumerate(outputs):
            for column in exact_gradients(choice.likelihood, output, choice.positions, read):
                yield [column if i == index else torch.zeros_like(other) for i, other in enumerate(outputs)]


def _differentiable(output: Any) -> list[Tensor]:
    """Returns the predictions in the model's result. Raises: ConfigError if there is none."""
    outputs = [x for x in predictions(output) if x.requires_grad]
    if not outputs:
        raise ConfigError(
            "fisher_backward needs what the model returned: a tensor [samples, ...] with gradient, or a dict, a tuple "
            f"or a ModelOutput that has some, got {type(output).__name__}"
        )
    return outputs


def _seed(place: str) -> int:
    """Returns a 63-bit number that differs between places; Python's own hash of a string changes between processes."""
    return int.from_bytes(sha256(place.encode()).digest()[:8], "big") >> 1
