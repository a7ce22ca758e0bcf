"""SINGD's roots of one layer as dense matrices, step by step, and the structures as projections of dense matrices."""

import torch
from torch import Tensor

__all__ = ["ema", "moved", "projected"]


def projected(matrix: Tensor, structure: str, width: int = 0) -> Tensor:
    """Returns the projection of a symmetric matrix on a structure, [n, n]: [L23], table 1."""
    n = len(matrix)
    found = torch.zeros_like(matrix)
    for i in range(n):
        for j in range(n):
            is_kept = i == j or structure == "dense"
            is_kept |= structure == "block_diagonal" and i // width == j // width
            is_kept |= structure == "low_rank" and i < width
            is_doubled = structure == "low_rank" and i < width <= j
            found[i, j] = matrix[i, j] * is_kept * (2 if is_doubled else 1)
    return found


def moved(
    K: Tensor,
    C: Tensor,
    A: Tensor,
    G: Tensor,
    *,
    damping: float,
    rate: float,
    structure: str = "dense",
    width: int = 0,
) -> tuple[Tensor, Tensor]:
    """Returns K and C after a step of the length `rate`, without momentum, of dense A and G."""

    def step(root: Tensor, factor: Tensor, other: Tensor, of_other: Tensor) -> Tensor:
        trace = (other.T @ of_other @ other).trace() / len(other)
        square = (other.T @ other).trace() / len(other)
        H = trace * root.T @ factor @ root + damping * square * root.T @ root - torch.eye(len(root), dtype=root.dtype)
        return root - rate * root @ projected(H / 2, structure, width)

    return step(K, A, C, G), step(C, G, K, A)


def ema(S: Tensor, factor: Tensor, damping: float, weight: float) -> Tensor:
    """Returns (1 - weight) S + weight (factor + damping I)."""
    return (1 - weight) * S + weight * (factor + damping * torch.eye(len(S), dtype=S.dtype))
