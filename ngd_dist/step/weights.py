"""Writes the weights: momentum, decay, rescaling."""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["MomentumMode", "apply_"]

MomentumMode = Literal["correct", "proportional", "chosen"]
Rescaling = Literal["off", "always", "shrink"]


@torch.no_grad()
def apply_(
    groups: Sequence[dict[str, Any]],
    directions: Mapping[nn.Parameter, Tensor],
    state: Mapping[Any, MutableMapping[str, Any]],
    *,
    momentum_mode: MomentumMode = "correct",
    rescaled: Mapping[nn.Parameter, int] | None = None,
    rescaling: Rescaling = "off",
) -> None:
    """Moves each parameter that has a direction; decays it by lr * weight_decay before (decoupled), rescales it after.

    momentum_mode: the part of the past, kept under "momentum_buffer" in `state`. Source: [OT20].
        correct: v <- m v + direction, w <- w - lr v, as torch.optim.SGD. A smaller lr shrinks the past's share of the
        next step with it; while lr falls this is the released code's rule, v <- m (lr / last lr) v + lr direction.
        proportional: v <- m' v + lr direction, w <- w - v, with the paper's m' = m lr / group["first_lr"].
        chosen: the same with m as it stands, of any sign: -v is the last step. For an lr and m of the quadratic model.
    rescaled: outputs (d_out) of each weight of a linear or convolution layer.
    rescaling: gives them the norm sqrt(2 d_out): always, or if it is larger (shrink, the released code's choice).

    Reads no number back from the device.
    """
    for group in groups:
        steps = [(p, step) for p in group["params"] if (step := directions.get(p)) is not None]
        if steps:
            _move_(steps, group, state, momentum_mode)
    moved = {weight: d_out for weight, d_out in (rescaled or {}).items() if weight in directions}
    if moved and rescaling != "off":
        _rescale_(moved, only_shrinks=rescaling == "shrink")


def _move_(
    steps_of_parameters: Sequence[tuple[nn.Parameter, Tensor]],
    group: dict[str, Any],
    state: Mapping[Any, MutableMapping[str, Any]],
    mode: MomentumMode,
) -> None:
    parameters: list[Tensor] = [p for p, _ in steps_of_parameters]
    steps = [step for _, step in steps_of_parameters]
    lr, momentum = group["lr"], group["momentum"]
    if group["weight_decay"] > 0:
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
    if momentum == 0 and mode != "chosen":  # a chosen momentum of 0 may be another one at the next step
        torch._foreach_add_(parameters, steps, alpha=-lr)
        return
    if mode == "proportional":
        momentum *= _share_of_first_lr(group)
    into_buffer, into_weights = (1, lr) if mode == "correct" else (lr, 1)
    buffers = [_buffer(state[p], p) for p in parameters]
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, steps, alpha=into_buffer)
    torch._foreach_add_(parameters, buffers, alpha=-into_weights)


def _share_of_first_lr(group: dict[str, Any]) -> float:
    """Returns lr / first_lr, at most 1: the paper's lr only falls, and under a rising one momentum could reach 1."""
    first = group["first_lr"]
    return min(1.0, group["lr"] / first) if first > 0 else 1.0


def _buffer(state: MutableMapping[str, Any], parameter: Tensor) -> Tensor:
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(parameter)
    buffer: Tensor = state["momentum_buffer"]
    return buffer


def _rescale_(outputs: Mapping[nn.Parameter, int], *, only_shrinks: bool) -> None:
    """w <- sqrt(2 d_out) w / (||w||_F + 1e-9). Source: [OT20]."""
    weights: list[Tensor] = list(outputs)
    # Half precision holds neither the 1e-9 nor the scale of a weight that is all zeros.
    dtype = torch.float64 if any(w.dtype == torch.float64 for w in weights) else torch.float32
    scales = list(torch._foreach_norm(weights, 2, dtype))
    torch._foreach_add_(scales, 1e-9)
    torch._foreach_reciprocal_(scales)
    torch._foreach_mul_(scales, [(2 * d_out) ** 0.5 for d_out in outputs.values()])
    if only_shrinks:
        torch._foreach_clamp_max_(scales, 1.0)
    for weight, scale in zip(weights, scales, strict=True):
        weight.copy_(weight.to(dtype) * scale)
