"""The plainest training loop: the same batch, step after step."""

import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD

__all__ = ["train"]


def train(optimizer: NGD, model: nn.Module, x: Tensor, y: Tensor, steps: int) -> list[float]:
    """Returns the cross-entropy before each step."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
