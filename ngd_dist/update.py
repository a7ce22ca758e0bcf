"""Writes the weights. Given the same directions, every rank computes bit-identical weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["apply_"]


@torch.no_grad()
def apply_(
    groups: list[dict[str, Any]], directions: Mapping[nn.Parameter, Tensor], state: Mapping[Any, dict[str, Any]]
) -> None:
    """Moves each parameter by -lr times its momentum buffer; decays weights by lr * weight_decay first (decoupled).

    buffer = momentum * buffer + direction, as torch.optim.SGD: a smaller lr shrinks the past's share of the next step
    with it, which is SP-NGD's released rule (momentum correction) in buffer form. Source: [OT20] code.
    """
    for group in groups:
        parameters = [p for p in group["params"] if p in directions]
        if not parameters:
            continue
        steps = [directions[p] for p in parameters]
        if group["weight_decay"] > 0:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        if group["momentum"] > 0:
            buffers = [state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in parameters]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, steps)
            steps = buffers
        torch._foreach_add_(parameters, steps, alpha=-group["lr"])
