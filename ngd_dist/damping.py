"""How lambda is shared between the two factors of a layer."""

import torch
from torch import Tensor

__all__ = ["pi_split"]


def pi_split(A_II: Tensor, G_OO: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Returns the multiples of I to add to A and to G: pi sqrt(lambda) and sqrt(lambda) / pi, as 0-d tensors.

    pi = sqrt((tr A / dim A) / (tr G / dim G)): with it the damped product is closest to A (x) G + lambda I in trace
    norm. pi is 1 where a trace is 0, negative or not finite, so that a dead layer still gets an invertible factor.
    Source: [MG15] section 6.3, trace norm.
    """
    mean_a = A_II.diagonal().mean()
    mean_g = G_OO.diagonal().mean()
    ratio = mean_a / mean_g
    pi = torch.where((ratio > 0) & torch.isfinite(ratio), ratio, torch.ones_like(ratio)).sqrt()
    root = damping**0.5
    return pi * root, root / pi
