"""Gradients of the model's output whose second moment is the Fisher of the model's own predictions.

A sample's Fisher block is J^T H J: J the derivative of its output, H the Hessian of its loss with respect to its output
(which, for the likelihoods here, does not depend on the label). The vectors v made here satisfy E[v v^T] = H (sampled)
or sum v v^T = H (exact); sent backward, they become g whose second moments are those of J^T H J. They are in units of
one sample's loss: nothing is divided by the size of the batch.

The labels at a sample's positions are independent given the prediction, so H is block diagonal over positions. In a
loss that is the mean over P positions each block is that of one position divided by P. So v carries 1/sqrt(P); the mean
loss's own gradient, with 1/P, would give H / P.

Shapes: N samples, P positions, C classes of one position. Source: [MG15] section 5.
"""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from ngd_dist.config import Bernoulli, Categorical, LikelihoodChoice, Positions
from ngd_dist.errors import ConfigError

__all__ = ["anywhere", "exact_gradients", "outputs_per_sample", "positions_read", "sampled_gradients"]


def sampled_gradients(
    choice: LikelihoodChoice,
    output: Tensor,
    generator: torch.Generator,
    positions: Positions,
    read: Tensor | None = None,
) -> Tensor:
    """Returns v like `output` for labels drawn from the prediction: E[v] = 0, and E[v v^T] is each sample's H.

    output: [N, ..., C], or with C at `class_dim` of Categorical. Bernoulli and Gaussian: the last dimension runs over
        the outputs of one position, whose losses add up, and the dimensions between it and the first over positions;
        an output [N] counts as [N, 1].
    generator: on the device of `output`; it alone decides the drawn labels.
    positions: how the sample's loss reduces over its positions.
    read: true where the loss reads the output, in the output's shape without the classes: other positions get 0, and a
        mean is over the positions that are read. None: everywhere.

    Computed in float32 at least. A NaN in the output gives a NaN, not an error: all ranks decide about it together.
    Raises: ConfigError for a class_dim that the output doesn't have, or a `read` of another shape.
    """
    scale, mask = _root_weight(choice, output, positions, read)
    wide = _at_least_float32(output)
    if isinstance(choice, Categorical):
        gradient = _sampled_categorical(wide, _class_dim(choice, output), generator)
    elif isinstance(choice, Bernoulli):
        gradient = torch.sigmoid(wide)
        drawn = torch.rand(wide.shape, generator=generator, dtype=wide.dtype, device=wide.device) < gradient
        gradient.sub_(drawn.to(wide.dtype))
    else:
        # (mean - label) / variance, where label = mean - sqrt(variance) * noise.
        noise = torch.randn(wide.shape, generator=generator, dtype=wide.dtype, device=wide.device)
        gradient = _constant(choice.variance**-0.5, wide).mul_(noise)
    gradient = gradient.mul_(scale) if mask is None else gradient.mul_(scale).mul_(mask)
    return gradient.to(output.dtype)


def exact_gradients(
    choice: LikelihoodChoice, output: Tensor, positions: Positions, read: Tensor | None = None
) -> Iterator[Tensor]:
    """Returns the columns v, each like `output`, of a root of every sample's H: the sum of v_n v_n^T is H_n.

    One column per output of a sample, since positions have labels of their own. Softmax: sqrt(p_c) (e_c - p), p the
    prediction. Arguments, dtypes and errors: those of `sampled_gradients`.
    """
    scale, mask = _root_weight(choice, output, positions, read)
    wide = _at_least_float32(output)
    if isinstance(choice, Categorical):
        dim = _class_dim(choice, output)
        probability = torch.softmax(wide, dim).movedim(dim, -1)
        columns: Iterator[Tensor] = (column.movedim(-1, dim) for column in _categorical_columns(probability, scale))
    elif isinstance(choice, Bernoulli):
        # sigmoid(-z) keeps the digits that 1 - sigmoid(z) loses.
        columns = _diagonal_columns((torch.sigmoid(wide) * torch.sigmoid(-wide)).sqrt_().mul_(scale))
    else:
        columns = _diagonal_columns(_constant(scale * choice.variance**-0.5, wide))
    return ((column if mask is None else column * mask).to(output.dtype) for column in columns)


def anywhere(choice: LikelihoodChoice, output: Tensor, read: Tensor) -> Tensor:
    """Returns noise like `output` at the positions that the loss reads, and 0 elsewhere. Raises: ConfigError."""
    mask = _root_weight(choice, output, "sum", read)[1]
    generator = torch.Generator(output.device).manual_seed(0)
    noise = torch.randn(output.shape, generator=generator, dtype=output.dtype, device=output.device)
    return noise if mask is None else noise.mul_(mask)


def outputs_per_sample(output: Tensor) -> int:
    """Returns the number of columns that `exact_gradients` gives for this output [N, ...]: one backward pass each."""
    return output.shape[1:].numel()


def _root_weight(
    choice: LikelihoodChoice, output: Tensor, positions: Positions, read: Tensor | None
) -> tuple[float, Tensor | None]:
    """Returns the square root of the weight that one position has in its sample's loss, and where the loss reads."""
    scale = 1.0 if positions == "sum" else positions_read(choice, output, read) ** -0.5
    if read is None:
        return scale, None
    dim = _position_dims(choice, output)[0]
    return scale, read if dim is None else read.unsqueeze(dim)


def positions_read(choice: LikelihoodChoice, output: Tensor, read: Tensor | None = None) -> float:
    """Returns the mean number of a sample's positions that the loss reads; 1 / N at least. One host read, if `read`.

    Raises: ConfigError.
    """
    _, rows = _position_dims(choice, output)
    if read is None:
        return max(prod(rows), 1) / max(rows[0], 1)
    if list(read.shape) != rows:
        raise ConfigError(
            f"ignored must have the output's shape without its classes, {rows}, got {list(read.shape)}; set class_dim "
            "if another dimension runs over classes"
        )
    return max(int(read.sum()), 1) / max(rows[0], 1)


def _position_dims(choice: LikelihoodChoice, output: Tensor) -> tuple[int | None, list[int]]:
    """Returns the dimension over classes, if there is one, and the lengths of the others, samples first."""
    dim = _class_dim(choice, output) if output.ndim > 1 else None
    return dim, [length for d, length in enumerate(output.shape) if d != dim]


def _class_dim(choice: LikelihoodChoice, output: Tensor) -> int:
    """Returns the dimension over the outputs of one position, counted from the first."""
    dim = choice.class_dim if isinstance(choice, Categorical) else -1
    if not (0 < dim < output.ndim or -output.ndim < dim < 0):
        raise ConfigError(
            f"class_dim {dim} is not one of the output's dimensions after the first, which counts samples: the output "
            f"has the shape {list(output.shape)}; set class_dim to the dimension that runs over classes"
        )
    return dim % output.ndim


def _at_least_float32(output: Tensor) -> Tensor:
    output = output.detach()
    return output.to(torch.promote_types(output.dtype, torch.float32))


def _constant(value: float, like: Tensor) -> Tensor:
    """Returns a tensor filled with `value`, and NaN where `like` is not finite."""
    return (like * 0).add_(value)


def _sampled_categorical(logits: Tensor, dim: int, generator: torch.Generator) -> Tensor:
    """Returns p - e_y along `dim`, y drawn from p = softmax(logits)."""
    probability = torch.softmax(logits, dim)
    # The first of independent exponential clocks with rates p to ring is distributed as p. Unlike torch.multinomial
    # this neither waits for the device nor, if a logit is NaN, kills its CUDA context.
    clocks = torch.empty_like(probability).exponential_(generator=generator)
    label = torch.div(probability, clocks, out=clocks).argmax(dim, keepdim=True)
    return probability.scatter_add_(dim, label, -torch.ones_like(label, dtype=logits.dtype))


def _categorical_columns(probability: Tensor, scale: float) -> Iterator[Tensor]:
    """Yields scale sqrt(p_c) (e_c - p) for every position and class: [N, ..., C], zero at the other positions."""
    p_NPC = probability.reshape(probability.shape[0], -1, probability.shape[-1])
    for position in range(p_NPC.shape[1]):
        for label in range(p_NPC.shape[2]):
            column = torch.zeros_like(p_NPC)
            p_NC = p_NPC[:, position]
            column[:, position] = p_NC * -p_NC[:, label, None].sqrt() * scale
            column[:, position, label] += p_NC[:, label].sqrt() * scale
            yield column.reshape(probability.shape)


def _diagonal_columns(roots: Tensor) -> Iterator[Tensor]:
    """Yields, per output of a sample, the roots of that output's own curvature, zero elsewhere."""
    flat = roots.reshape(roots.shape[0], -1)
    for index in range(flat.shape[1]):
        column = torch.zeros_like(flat)
        column[:, index] = flat[:, index]
        yield column.reshape(roots.shape)
