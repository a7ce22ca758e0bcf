"""A model of two layers under LNGD, and its statistics of the step that is under way."""

import torch
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import LNGD, FixedInterval
from ngd_dist.statistics.statistic import Key
from tests.support.tensors import F64

CONFIG = NGDConfig(preconditioner=LNGD(), momentum=0.0, staleness=FixedInterval())


def phi_and_psi(optimizer: NGD, layer: str) -> tuple[Tensor, Tensor]:
    """Returns Phi and Psi of the step that is under way."""
    found = optimizer._capture.take()
    return found[Key(layer, "Phi")], found[Key(layer, "Psi")]


def with_ones(a: Tensor) -> Tensor:
    return torch.cat([a, a.new_ones(*a.shape[:-1], 1)], dim=-1)


def weighed(x: Tensor, squares: Tensor) -> Tensor:
    """Returns Psi of squared slopes [N, O]: their mean with the weights ||a||^2."""
    return (with_ones(x).square().sum(1, keepdim=True) * squares).mean(0)


def two_layers(activation: nn.Module | None = None) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Returns a model, and its inputs and labels: 8 samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), activation or nn.Tanh(), nn.Linear(4, 3)).double()
    return model, torch.randn(8, 5, dtype=F64), torch.randint(3, (8,))
