"""Factors in (0, 1] that bound the length of a step; the same on every rank that has the same numbers.

They stay on the device: no number is read back.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["kl_factor", "norm_factor"]


def kl_factor(inner: Tensor, max_kl: float) -> Tensor:
    """Returns nu = min(1, sqrt(max_kl / |inner|)) as a 0-d tensor: what to multiply every direction with; 1 for 0.

    inner: 0-d, the sum of lr^2 <direction, gradient> over all preconditioned layers of all ranks, with the gradient as
        it was before momentum and weight decay.

    With direction = F^-1 gradient, inner is lr^2 direction^T F direction, twice the step's KL divergence. That is
    quadratic in the direction, hence the root: it becomes nu^2 inner <= max_kl. Source: KFAC-PyTorch's code.
    """
    return (max_kl / inner.abs()).sqrt().clamp(max=1)


def norm_factor(directions: Iterable[Tensor], max_norm: float) -> Tensor:
    """Returns min(1, max_norm / ||directions||) as a 0-d tensor: the norm is that of all of them as one vector.

    directions: at least one, on one device, the same on every rank that will multiply with the factor.
    """
    tensors = list(directions)
    # Half precision overflows at 65504, and the factor would be 0.
    dtype = torch.float64 if any(d.dtype == torch.float64 for d in tensors) else torch.float32
    norm = torch.linalg.vector_norm(torch.stack(list(torch._foreach_norm(tensors, 2, dtype))))
    factor: Tensor = (max_norm / norm).clamp(max=1)
    return factor
