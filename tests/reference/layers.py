"""Statistics of single modules from derivatives alone: what a layer's weight sees is the slope of its output in it."""

from itertools import product

import torch
from torch import Tensor, nn


def unit_rows(module: nn.Module, x: Tensor, *, units: int, unit_dim: int, of_unit: slice) -> Tensor:
    """Returns a_NPI of the first output unit in `of_unit`: d output / d its own weights, weight first, bias last.

    `unit_dim`: the dimension of the output that counts output units. A weight [units, ...] belongs to its own unit.
    """
    output = module(x).movedim(unit_dim, -1)
    assert output.shape[-1] == units
    rows = []
    for value in output[..., of_unit.start].flatten():
        gradients = torch.autograd.grad(value, list(module.parameters()), retain_graph=True)
        rows.append(torch.cat([gradient[of_unit.start].flatten() for gradient in gradients]))
    return torch.stack(rows).view(x.shape[0], -1, rows[0].numel())


def kronecker_factors(a_NPI: Tensor, g_NPO: Tensor) -> tuple[Tensor, Tensor]:
    """Returns A = (1/N) sum_np a a^T and G = (1/(N P)) sum_np g g^T, one row at a time."""
    N, P, _ = a_NPI.shape
    A = sum(torch.outer(a, a) for a in a_NPI.flatten(0, 1)) / N
    G = sum(torch.outer(g, g) for g in g_NPO.flatten(0, 1)) / (N * P)
    assert isinstance(A, Tensor)
    assert isinstance(G, Tensor)
    return A, G


def attention(
    query: Tensor, key: Tensor, value: Tensor, weights: list[Tensor], biases: list[Tensor], heads: int
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Returns the output [N, L, E], the projections q, k, v before the heads part, and the heads' joint output.

    Inputs are [N, L, E] and [N, S, E]; weights and biases those of q, k, v and of the output.
    """
    projected = [
        x @ weight.T + bias for x, weight, bias in zip((query, key, value), weights[:3], biases[:3], strict=True)
    ]
    q, k, v = (x.unflatten(-1, (heads, -1)).movedim(-2, 1) for x in projected)
    scores = q @ k.mT / q.shape[-1] ** 0.5
    joint = (scores.softmax(-1) @ v).movedim(1, -2).flatten(-2)
    return joint @ weights[3].T + biases[3], projected, joint


def patches(x: Tensor, kernel: list[int], dilation: list[int], padding: list[tuple[int, int]], groups: int) -> Tensor:
    """Returns the patches that a convolution with stride 1 and zero padding sees, [groups, N positions, inputs]."""
    sides = [side for pair in reversed(padding) for side in pair]
    padded = torch.nn.functional.pad(x, sides)
    spans = [step * (size - 1) + 1 for size, step in zip(kernel, dilation, strict=True)]
    starts = [range(whole - span + 1) for whole, span in zip(padded.shape[2:], spans, strict=True)]
    rows = []
    for corner in product(*starts):
        cut = padded
        for axis, (start, span, step) in enumerate(zip(corner, spans, dilation, strict=True)):
            cut = cut.narrow(2 + axis, start, span).index_select(2 + axis, torch.arange(0, span, step))
        rows.append(cut.unflatten(1, (groups, -1)).flatten(2).transpose(0, 1))
    return torch.cat(rows, dim=1)
