"""One run of a layer, and the part of a tensor that some samples are."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Run", "of_samples"]


@dataclass(slots=True, eq=False)
class Run:
    """One run of a layer: the tensors kept of it, and its gradient once that has come.

    `samples` is N of the model's batch; if one run serves all samples (position embeddings), it is 1 and `sharers` is
    N. `weight` is a factor on the gradient. `slope` is the derivative of the activation that read the output, at that
    output; None if no activation module did.
    """

    kept: Any
    samples: int = 1
    sharers: int = 1
    weight: float = 1.0
    g: Tensor | None = None
    slope: Tensor | None = None


def of_samples(x: Tensor, part: range, samples: int, dim: int = 0) -> Tensor:
    """Returns the part of x that these samples are, a view if each has one row: `dim` may count windows of samples."""
    wanted = (slice(None),) * dim + (slice(part.start, part.stop, part.step),)
    if x.shape[dim] == samples:
        return x[wanted]
    grouped: Tensor = x.unflatten(dim, (samples, -1))
    return grouped[wanted].flatten(dim, dim + 1)
