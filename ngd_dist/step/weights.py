"""Writes the weights: momentum, decay, rescaling."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
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
    weight: Callable[[nn.Parameter], Tensor] = lambda p: p,
    summed: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Moves each parameter that has a direction; decays it by lr * weight_decay before (decoupled), rescales it after.

    momentum_mode: the part of the past, kept under "momentum_buffer" in `state`. Source: [OT20].
        correct: v <- m v + direction, w <- w - lr v, as torch.optim.SGD. A smaller lr shrinks the past's share of the
        next step with it; while lr falls this is the released code's rule, v <- m (lr / last lr) v + lr direction.
        proportional: v <- m' v + lr direction, w <- w - v, with the paper's m' = m lr / group["first_lr"].
        chosen: the same with m as it stands, of any sign: -v is the last step. For an lr and m of the quadratic model.
    rescaled: outputs (d_out) of each weight of a linear or convolution layer.
    rescaling: gives them the norm sqrt(2 d_out): always, or if it is larger (shrink, the released code's choice).
    weight: returns the tensor to move, in the shape of its direction: the parameter, or a piece of it.
    summed: for pieces, returns the sum of a tensor over ranks. `rescaled` then has the same weights on every rank, and
    all of
        them are rescaled, whether this rank has a piece of them or not.

    Reads no number back from the device.
    """
    for group in groups:
        steps = [(p, step) for p in group["params"] if (step := directions.get(p)) is not None]
        if steps:
            _move_(steps, group, state, momentum_mode, weight)
    moved = {p: d_out for p, d_out in (rescaled or {}).items() if summed is not None or p in directions}
    if moved and rescaling != "off":
        pieces = [weight(p) if p in directions else None for p in moved]
        _rescale_(pieces, [*moved.values()], only_shrinks=rescaling == "shrink", summed=summed)


def _move_(
    steps_of_parameters: Sequence[tuple[nn.Parameter, Tensor]],
    group: dict[str, Any],
    state: Mapping[Any, MutableMapping[str, Any]],
    mode: MomentumMode,
    weight: Callable[[nn.Parameter], Tensor],
) -> None:
    parameters: list[Tensor] = [weight(p) for p, _ in steps_of_parameters]
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
    buffers = [_buffer(state[p], moved) for (p, _), moved in zip(steps_of_parameters, parameters, strict=True)]
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


def _rescale_(
    weights: Sequence[Tensor | None],
    outputs: Sequence[int],
    *,
    only_shrinks: bool,
    summed: Callable[[Tensor], Tensor] | None,
) -> None:
    """w <- sqrt(2 d_out) w / (||w||_F + 1e-9); None for a weight of which this rank has no piece. Source: [OT20]."""
    here = [w for w in weights if w is not None]
    # Half precision holds neither the 1e-9 nor the scale of a weight that is all zeros.
    dtype = torch.float64 if any(w.dtype == torch.float64 for w in here) else torch.float32
    scales = list(torch._foreach_norm(here, 2, dtype)) if here else []
    if summed is not None:
        scales = _norms_of_all([w is not None for w in weights], scales, summed)
        outputs = [d_out for w, d_out in zip(weights, outputs, strict=True) if w is not None]
    if not here:
        return
    torch._foreach_add_(scales, 1e-9)
    torch._foreach_reciprocal_(scales)
    torch._foreach_mul_(scales, [(2 * d_out) ** 0.5 for d_out in outputs])
    if only_shrinks:
        torch._foreach_clamp_max_(scales, 1.0)
    for weight, scale in zip(here, scales, strict=True):
        weight.copy_(weight.to(dtype) * scale)


def _norms_of_all(is_here: Sequence[bool], norms: Sequence[Tensor], summed: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Returns the norms over all ranks of the weights of which this rank has a piece, from those of its pieces."""
    device = norms[0].device if norms else None
    squares = torch.zeros(len(is_here), dtype=torch.float64, device=device)
    places = [place for place, has_piece in enumerate(is_here) if has_piece]
    if norms:
        squares[places] = torch.stack(list(norms)).double().square()
    totals = summed(squares).sqrt()
    return [totals[place].to(norms[0]) for place in places]
