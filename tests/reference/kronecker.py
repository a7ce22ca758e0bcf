"""Dense Kronecker-factored Fisher blocks of one layer from its rows, block by block and sample by sample.

Rows are a [B, N, P, I] and g [B, N, P, O]; a block's Fisher is [O I, O I], for gradients flattened row by row.
"""

import torch
from torch import Tensor

__all__ = ["eigenbasis", "ekfac_block", "factors", "fisher", "reduced", "sample_gradients", "solve"]


def sample_gradients(a: Tensor, g: Tensor) -> Tensor:
    """Returns the sum over positions of g a^T of every sample, [B, N, O, I]."""
    B, N, P, I = a.shape  # noqa: E741
    found = torch.zeros(B, N, g.shape[-1], I, dtype=a.dtype)
    for b in range(B):
        for n in range(N):
            for p in range(P):
                found[b, n] += torch.outer(g[b, n, p], a[b, n, p])
    return found


def fisher(gradients: Tensor) -> Tensor:
    """Returns the mean of v v^T over the samples of one block, from [N, O, I]."""
    flat = gradients.flatten(1)
    return sum((torch.outer(v, v) for v in flat), torch.zeros(flat.shape[1], flat.shape[1], dtype=flat.dtype)) / len(
        flat
    )


def reduced(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the rows of [E23]'s reduce setting: inputs averaged and output gradients summed over positions."""
    return a.mean(2, keepdim=True), g.sum(2, keepdim=True)


def factors(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Returns A [B, I, I] = (1/N) sum a a^T and G [B, O, O] = (1/(N P)) sum g g^T."""
    _, N, P, _ = a.shape
    A = torch.einsum("bnpi,bnpj->bij", a, a) / N
    G = torch.einsum("bnpi,bnpj->bij", g, g) / (N * P)
    return A, G


def eigenbasis(A: Tensor, G: Tensor) -> Tensor:
    """Returns the eigenvectors of G (x) A of one block, in columns; of a vector, taken for a diagonal, the identity."""
    U_A, U_G = (
        torch.linalg.eigh(factor)[1] if factor.ndim == 2 else torch.eye(len(factor), dtype=factor.dtype)
        for factor in (A, G)
    )
    return torch.kron(U_G.contiguous(), U_A.contiguous())


def ekfac_block(basis: Tensor, block: Tensor) -> Tensor:
    """Returns U diag(U^T F U) U^T, from U and F [O I, O I]."""
    return basis @ torch.diag((basis.T @ block @ basis).diagonal()) @ basis.T


def solve(block: Tensor, damping: float, grad_OI: Tensor) -> Tensor:
    """Returns (F + damping I)^-1 grad, [O, I]."""
    damped = block + damping * torch.eye(block.shape[0], dtype=block.dtype)
    solution: Tensor = torch.linalg.solve(damped, grad_OI.flatten())
    return solution.view_as(grad_OI)
