"""The plainest training loop, which takes the same batch step after step; the weights of a job's checkpoint."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD
from ngd_workers.train.checkpoints import Checkpoints

__all__ = ["train", "weights_at"]


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


def weights_at(run_dir: Path, step: int, attempt: int = 1) -> dict[str, Tensor]:
    """Returns the model's state in the checkpoint of this step."""
    weights, _ = Checkpoints(run_dir / "checkpoints", attempt, 2).load(step, torch.device("cpu"))
    assert weights is not None
    return weights
