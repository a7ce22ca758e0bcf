"""A model with each kind of layer that SENG tells apart, and the steps that its dense formula expects on any ranks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import SENG, FixedInterval
from tests.reference.fisher import sample_gradients
from tests.reference.seng import joined, mean_direction
from tests.support.tensors import F64

__all__ = ["DAMPING", "EXACT", "batch", "config", "directions", "expected", "net"]

DAMPING, SAMPLES = 0.05, 24
# Neither sketched nor cut, with each gradient formed or not.
EXACT = {"explicit": SENG(q=None), "implicit": SENG(q=None, r=None, max_explicit=0)}


class Net(nn.Module):
    """A grouped convolution, a layer that is used at several positions, and one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, groups=2)
        self.mixed = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x)).mT
        logits: Tensor = self.head(torch.tanh(self.mixed(h)).mean(1))
        return logits


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def batch(step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(SAMPLES, 4, 7, dtype=F64, generator=generator)
    return x, torch.randint(3, (SAMPLES,), generator=generator)


def config(method: SENG, **settings: Any) -> NGDConfig:
    fixed = {"preconditioner": method, "damping": DAMPING, "lr": 1.0, "momentum": 0.0, "staleness": FixedInterval()}
    return NGDConfig.model_validate(fixed | settings)


def directions(
    model: nn.Module, optimizer: NGD, step: int = 0, rank: int = 0, world_size: int = 1, passes: int = 1
) -> dict[str, Tensor]:
    """Returns the way of each parameter in one step, by the learning rate 1 its direction."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, y = (of_all.chunk(world_size)[rank] for of_all in batch(step))
    optimizer.zero_grad()
    for some, labels in zip(x.chunk(passes), y.chunk(passes), strict=True):
        (F.cross_entropy(model(some), labels) / passes).backward()
    optimizer.step()
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}


def expected(model: Net, world_size: int = 1, step: int = 0) -> dict[str, Tensor]:
    """Returns the directions of a step on so many ranks: the mean of the dense solutions with each rank's samples."""
    x, y = batch(step)
    names = [name for name, _ in model.named_parameters()]
    of_samples = dict(zip(names, sample_gradients(model, F.cross_entropy, x, y), strict=True))
    ways = {}
    for name, layer in model.named_children():
        blocks = layer.groups if isinstance(layer, nn.Conv1d) else 1
        gradients_NBOI = joined(of_samples[f"{name}.weight"], of_samples.get(f"{name}.bias"), blocks)
        way = mean_direction(gradients_NBOI.mean(0), gradients_NBOI.chunk(world_size), DAMPING).flatten(0, 1)
        if f"{name}.bias" in of_samples:
            ways[f"{name}.bias"], way = way[:, -1], way[:, :-1]
        ways[f"{name}.weight"] = way.reshape(layer.weight.shape)
    return ways
