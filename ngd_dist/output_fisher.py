"""The backward passes that a Fisher other than the empirical one takes: one per drawn label, or per output."""

from hashlib import sha256

import torch
from torch import Tensor

from ngd_dist.capture import Capture
from ngd_dist.config import Empirical, Exact, NGDConfig
from ngd_dist.errors import ConfigError
from ngd_dist.likelihood import exact_gradients, outputs_per_sample, sampled_gradients

__all__ = ["OutputFisher"]


class OutputFisher:
    """Feeds `capture` with gradients of the model's own predictions."""

    def __init__(self, config: NGDConfig, capture: Capture, rank: int) -> None:
        self._choice = config.fisher
        self._capture = capture
        self._rank = rank

    def backward(self, output: Tensor, step: int) -> None:
        """Runs the passes of one micro-batch, if a due statistic needs them. Raises: ConfigError, CaptureError."""
        choice = self._choice
        if isinstance(choice, Empirical) or not self._capture.needs_fisher_pass:
            return
        if isinstance(choice, Exact):
            outputs = outputs_per_sample(output)
            if outputs > choice.max_outputs:
                raise ConfigError(
                    f"the exact Fisher takes one backward pass per output of a sample: {outputs}, but max_outputs is "
                    f"{choice.max_outputs}; raise it, or take fisher monte_carlo"
                )
            self._capture.fisher_pass(output, exact_gradients(choice.likelihood, output, choice.positions), weight=1.0)
            return
        # Of the step, the rank and the micro-batch alone, so that a resumed run draws what an unbroken one draws.
        place = f"{choice.seed} {step} {self._rank} {self._capture.fisher_passes}"
        generator = torch.Generator(output.device).manual_seed(_seed(place))
        draws = (
            sampled_gradients(choice.likelihood, output, generator, choice.positions) for _ in range(choice.samples)
        )
        self._capture.fisher_pass(output, draws, weight=1 / choice.samples)


def _seed(place: str) -> int:
    """Returns a 63-bit number that differs between places; Python's own hash of a string changes between processes."""
    return int.from_bytes(sha256(place.encode()).digest()[:8], "big") >> 1
