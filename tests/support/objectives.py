"""Losses as the optimizer evaluates them again, and steps to evaluate them after."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist.step.quadratic import Objective

Tangent = Mapping[nn.Parameter, Tensor]


def objective_of(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, loss: Any = F.cross_entropy) -> Objective:
    def objective() -> tuple[Tensor, Tensor]:
        output = model(x)
        return loss(output, y), output

    return objective


def random_steps(model: nn.Module, count: int = 2) -> list[Tangent]:
    return [{p: torch.randn_like(p) for p in model.parameters()} for _ in range(count)]
