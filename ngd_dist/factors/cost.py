"""The shape of a layer, from which every cost is counted. Imports without torch."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["ROWS_CHECK", "LayerShape", "SampleCost"]

# Operations that take as long as a check that a gradient is made of its rows, and as keeping these: some 0.1 ms.
ROWS_CHECK = 2**23
# The samples of a rank for which operations are counted before any is known: the batch of SENG's authors.
SAMPLES = 256


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The gradient of a layer is [blocks, outputs, inputs]; a bias is the last input column.

    The layer's Fisher block is itself block-diagonal with `blocks` equal parts: the groups of a convolution, the three
    projections of attention; 1 for most layers. `fisher` is the kind of each part: Kronecker-factored, or one small
    matrix per output unit. `has_one_hot_inputs`: each input row is a single 1, so that A is exactly diagonal.
    """

    name: str
    fisher: Literal["kronecker", "unit_wise"]
    inputs: int
    outputs: int
    blocks: int = 1
    has_one_hot_inputs: bool = False

    @property
    def gradient(self) -> tuple[int, int, int]:
        """The shape of grad_BOI."""
        return self.blocks, self.outputs, self.inputs

    @property
    def row_numbers(self) -> int:
        """The numbers in a row of inputs and a row of output gradients."""
        return self.blocks * (self.inputs + self.outputs)


@dataclass(frozen=True, slots=True)
class SampleCost:
    """The operations on U, the gradients [O, I] of N samples, for each of B blocks; see `factors.samples`.

    sketched: the outputs and inputs, or entries and 1, of which products are taken; the layer's own if all are.
    is_explicit: whether each gradient is formed; if not, rows count, N samples times P positions.
    """

    blocks: int
    outputs: int
    inputs: int
    sketched: tuple[int, int]
    is_explicit: bool

    def refresh_flops(self, samples: int = SAMPLES, positions: int = 1) -> int:
        """Returns the operations of U^T U, and of inverting it."""
        rows, (outputs, inputs) = samples, self.sketched
        if not self.is_explicit:
            rows *= positions
        width = outputs * inputs if self.is_explicit else outputs + inputs
        return self.blocks * (2 * rows * rows * width + 2 * samples**3)

    def apply_flops(self, samples: int = SAMPLES, positions: int = 1) -> int:
        """Returns the operations of U^T grad, of the solution, and of U times it."""
        rows, (outputs, inputs) = samples if self.is_explicit else samples * positions, self.sketched
        return self.blocks * (2 * rows * (outputs * inputs + self.outputs * self.inputs) + 2 * samples * samples)
