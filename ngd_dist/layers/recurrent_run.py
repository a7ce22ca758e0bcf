"""One run of a recurrent module: its tensors in one form, and the rows of all its layers and directions.

The kernel gives the outputs of the last layer alone. Those of the layers below are made again by the same kernel,
layer by layer, and only if rows are read.

Shapes: T steps, N samples, I inputs, P outputs of a direction, D directions (1 or 2), L layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ngd_dist.layers.recurrent_steps import GRUSteps, LSTMSteps, ReluSteps, RNNSteps, StepGradients, Steps, Weights

__all__ = ["KINDS", "Chain", "Kind", "RecurrentRun", "padded"]


class Kind(NamedTuple):
    """A formula of steps, and the fused function of torch that carries it out."""

    steps: type[Steps]
    fused: Any


KINDS = {
    "LSTM": Kind(LSTMSteps, torch.lstm),
    "GRU": Kind(GRUSteps, torch.gru),
    "RNN_TANH": Kind(RNNSteps, torch.rnn_tanh),
    "RNN_RELU": Kind(ReluSteps, torch.rnn_relu),
}


class Chain(NamedTuple):
    """One direction (0 or 1: from the end) of one layer of a module."""

    layer: int
    direction: int


@dataclass(eq=False)
class RecurrentRun:
    """What is kept of a run.

    `x` [T, N, I], `outputs` [T, N, D P]: 0 where a sample of `lengths` [N] has ended (None: all have T steps).
    `states`: the initial ones, h [L D, N, P] and, of an LSTM, c [L D, N, H]; empty: zeros.
    `weights`: of each chain, as they were in forward. `returned`: the shapes of the tensors that the gradient has one
    after the other: "outputs", as the kernel has them, and the last "h" and "c". `packing`: of outputs that are packed.
    """

    kind: Kind
    x: Tensor
    outputs: Tensor
    states: tuple[Tensor, ...]
    weights: dict[Chain, Weights]
    returned: Mapping[str, torch.Size]
    dtype: torch.dtype
    lengths: Tensor | None = None
    packing: PackedSequence | None = None
    _latest: tuple[Any, Tensor, dict[Chain, StepGradients]] | None = field(default=None, init=False)

    @property
    def rows(self) -> int:
        """N T, padding included."""
        return self.x.shape[0] * self.x.shape[1]

    @property
    def positions(self) -> float:
        """The steps of a sample, a mean over the samples."""
        steps, samples = self.x.shape[:2]
        return steps if self.lengths is None else int(self.lengths.sum()) / samples

    @cached_property
    def is_step_TN1(self) -> Tensor | None:
        """Whether each sample has the step; None if all have all."""
        if self.lengths is None:
            return None
        steps = torch.arange(len(self.x), device=self.x.device)
        return (steps.unsqueeze(1) < self.lengths.to(steps.device)).unsqueeze(-1)

    def steps(self, chain: Chain) -> Steps:
        """Returns the steps of one direction of one layer."""
        outputs = self._part(self._outputs_of(chain.layer), chain)
        x, outputs = (self._in_order(value, chain) for value in (self._inputs_of(chain.layer), outputs))
        h, *c = self._initial(chain)
        weights, is_last = self.weights[chain].to(self.dtype), None
        if self.lengths is not None:
            numbers = torch.arange(1, len(x) + 1).unsqueeze(1)
            is_last = (numbers == self.lengths).unsqueeze(-1).to(x.device)
        return self.kind.steps(x, outputs, h, c[0] if c else None, weights, is_last)

    def gradients(self, g: Tensor) -> dict[Chain, StepGradients]:
        """Returns the gradients of the steps of all chains from g, the gradients of all that the module returned.

        The layers of a module ask one after the other, each with a tensor of its own on the same memory.
        """
        key = g.data_ptr(), g._version, g.shape, g.device
        if self._latest is None or self._latest[0] != key:
            self._latest = key, g, self._scanned(g)  # g stays, so that nothing else comes to lie there
        return self._latest[2]

    def _scanned(self, g: Tensor) -> dict[Chain, StepGradients]:
        returned = self._apart(g.to(self.dtype))
        found: dict[Chain, StepGradients] = {}
        below = returned["outputs"]
        for chain in sorted(self.weights, reverse=True):
            if chain.direction == self._directions - 1:  # the first of its layer here
                of_layer, below = below, torch.zeros_like(self._inputs_of(chain.layer))
            steps, index = self.steps(chain), self._index(chain)
            g_TNP = self._in_order(self._part(of_layer, chain), chain)
            if "h" in returned:
                g_TNP = g_TNP + self._at_the_end(returned["h"][index])
            found[chain] = steps.gradients(g_TNP, returned["c"][index] if "c" in returned else None)
            if chain.layer > 0:
                below += self._in_order(found[chain].ih @ steps.weights.ih, chain)
        return found

    def _apart(self, g: Tensor) -> dict[str, Tensor]:
        """Returns the gradients of the outputs, [T, N, D P], and of the last states."""
        pieces = g.reshape(-1).split([shape.numel() for shape in self.returned.values()])
        parts = {name: piece.view(self.returned[name]) for name, piece in zip(self.returned, pieces, strict=True)}
        if self.packing is not None:
            parts["outputs"] = padded(parts["outputs"], self.packing)
        return parts

    def _part(self, outputs: Tensor, chain: Chain) -> Tensor:
        """Returns the part of a layer's outputs that is the chain's, [T, N, P]."""
        return outputs.chunk(self._directions, -1)[chain.direction]

    @property
    def _directions(self) -> int:
        return max(self.weights).direction + 1

    def _at_the_end(self, state: Tensor) -> Tensor:
        """Returns [T, N, P] with the state at the last step of each sample in the order of a chain, 0 elsewhere."""
        steps, samples = self.x.shape[:2]
        placed = state.new_zeros(steps, *state.shape)
        if self.lengths is None:
            placed[-1] = state
        else:
            placed[self.lengths - 1, torch.arange(samples)] = state
        return placed

    def _in_order(self, value: Tensor, chain: Chain) -> Tensor:
        """Returns [T, N, ...] in the order of a chain, or back: from the end each sample begins with its last step."""
        if chain.direction == 0:
            return value
        if self.lengths is None:
            return value.flip(0)
        steps, lengths = torch.arange(len(value)).unsqueeze(1), self.lengths
        index_TN = torch.where(steps < lengths, lengths - 1 - steps, steps).to(value.device)
        return value.gather(0, index_TN.unsqueeze(-1).expand_as(value))

    def _index(self, chain: Chain) -> int:
        return chain.layer * self._directions + chain.direction

    def _initial(self, chain: Chain) -> list[Tensor]:
        if self.states:
            return [state[self._index(chain)].to(self.dtype) for state in self.states]
        weights, samples = self.weights[chain], self.x.shape[1]
        widths = (weights.hh.shape[1], weights.hh.shape[0] // self.kind.steps.gates)
        zeros = [self.x.new_zeros(samples, width, dtype=self.dtype) for width in widths]
        return zeros if self.kind.steps is LSTMSteps else zeros[:1]

    def _inputs_of(self, layer: int) -> Tensor:
        return self._outputs_of(layer - 1) if layer else self.x.to(self.dtype)

    def _outputs_of(self, layer: int) -> Tensor:
        return self.outputs.to(self.dtype) if layer == max(self.weights).layer else self._inner[layer]

    @cached_property
    def _inner(self) -> list[Tensor]:
        """The outputs of all layers but the last, [T, N, D P]."""
        x, found = self.x.to(self.dtype), []
        for layer in range(max(self.weights).layer):
            x = self._fused(x, [chain for chain in sorted(self.weights) if chain.layer == layer])
            found.append(x)
        return found

    def _fused(self, x: Tensor, chains: list[Chain]) -> Tensor:
        """Returns the outputs of one layer by torch's kernel."""
        of_chains = [self.weights[chain] for chain in chains]
        weights = [w.to(self.dtype) for of_chain in of_chains for w in of_chain if w is not None]
        states = [torch.stack(alike) for alike in zip(*(self._initial(chain) for chain in chains), strict=True)]
        settings = (of_chains[0].ih_bias is not None, 1, 0.0, False, len(chains) == 2)
        # cuDNN would warn that weights of one layer are no block of memory of their own.
        with torch.backends.cudnn.flags(enabled=False):
            if self.lengths is None:
                state = tuple(states) if len(states) == 2 else states[0]
                outputs: Tensor = self.kind.fused(x, state, weights, *settings, False)[0]
                return outputs
            packed = pack_padded_sequence(x, self.lengths, enforce_sorted=False)
            assert packed.sorted_indices is not None
            states = [state.index_select(1, packed.sorted_indices) for state in states]
            state = tuple(states) if len(states) == 2 else states[0]
            data = self.kind.fused(packed.data, packed.batch_sizes, state, weights, *settings)[0]
        return padded(data, packed)


def padded(data: Tensor, like: PackedSequence) -> Tensor:
    """Returns packed rows as [T, N, ...], 0 where a sample has ended, with the samples in the caller's order."""
    packed = PackedSequence(data, like.batch_sizes, like.sorted_indices, like.unsorted_indices)
    return pad_packed_sequence(packed)[0]
