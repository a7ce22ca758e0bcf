"""SENG's direction of one layer from its per-sample gradients, by one dense solve for each block."""

from collections.abc import Sequence

import torch
from torch import Tensor


def joined(weight_NO: Tensor, bias_NO: Tensor | None, blocks: int) -> Tensor:
    """Returns [N, B, O, I] of the samples' weight gradients [N, B O, *] and bias gradients [N, B O], the bias last."""
    rows = weight_NO.flatten(2)
    whole = rows if bias_NO is None else torch.cat([rows, bias_NO.unsqueeze(-1)], dim=-1)
    return whole.unflatten(1, (blocks, -1))


def fisher(gradients_NBOI: Tensor) -> Tensor:
    """Returns (1/N) sum_n u_n u_n^T of each block, [B, O I, O I]."""
    flat = gradients_NBOI.flatten(2)
    return torch.einsum("nbi,nbj->bij", flat, flat) / len(flat)


def direction(grad_BOI: Tensor, gradients_NBOI: Tensor, damping: float) -> Tensor:
    """Returns (lambda I + U U^T)^-1 grad, [B, O, I]."""
    F = fisher(gradients_NBOI)
    damped = F + damping * torch.eye(F.shape[-1], dtype=F.dtype)
    return torch.linalg.solve(damped, grad_BOI.flatten(1)).view_as(grad_BOI)


def mean_direction(grad_BOI: Tensor, of_ranks: Sequence[Tensor], damping: float) -> Tensor:
    """Returns the mean over ranks of the direction that each makes of the mean gradient with its own samples."""
    return torch.stack([direction(grad_BOI, gradients, damping) for gradients in of_ranks]).mean(0)
