"""Tensors that many tests look at: the weights of a model, the statistics of a step."""

import torch
from torch import Tensor, nn

from ngd_dist import NGD

F64 = torch.float64


def weights(model: nn.Module) -> list[Tensor]:
    """Returns copies of the parameters."""
    return [p.detach().clone() for p in model.parameters()]


def flat(model: nn.Module) -> Tensor:
    """Returns all parameters as one vector, a copy."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def captured(optimizer: NGD, block: int | None = None) -> dict[str, Tensor]:
    """Returns the statistics of the step that is under way, by "layer.statistic"; of one block if `block` is given."""
    statistics = optimizer._capture.take()
    return {str(key): value if block is None else value[block] for key, value in statistics.items()}


def batch(samples: int = 64) -> tuple[Tensor, Tensor]:
    """Returns samples with 8 features and one of 4 classes each, the same at each call."""
    torch.manual_seed(0)
    return torch.randn(samples, 8, dtype=F64), torch.randint(0, 4, (samples,))
