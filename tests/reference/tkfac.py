"""TKFAC's Fisher block of one layer, from its rows a [N, P, I] and g [N, P, O], one row at a time."""

import torch
from torch import Tensor

__all__ = ["block", "direction", "factors", "layer_fisher"]


def layer_fisher(a: Tensor, g: Tensor) -> Tensor:
    """Returns (1/N) sum_n sum_p (g g^T) (x) (a a^T), [O I, O I] for a row-major gradient: positions are samples."""
    total = torch.zeros((), dtype=a.dtype)
    for a_P, g_P in zip(a, g, strict=True):
        for x, y in zip(a_P, g_P, strict=True):
            total = total + torch.kron(torch.outer(y, y), torch.outer(x, x))
    return total / len(a)


def factors(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns delta, and Phi [I, I] and Psi [O, O] of trace 1."""
    delta, Phi, Psi = (torch.zeros((), dtype=a.dtype) for _ in range(3))
    for a_P, g_P in zip(a, g, strict=True):
        for x, y in zip(a_P, g_P, strict=True):
            delta = delta + x.dot(x) * y.dot(y)
            Phi = Phi + y.dot(y) * torch.outer(x, x)
            Psi = Psi + x.dot(x) * torch.outer(y, y)
    return delta / len(a), Phi / delta, Psi / delta


def block(a: Tensor, g: Tensor) -> Tensor:
    """Returns delta Psi (x) Phi."""
    delta, Phi, Psi = factors(a, g)
    return delta * torch.kron(Psi, Phi)


def direction(grad_OI: Tensor, delta: Tensor, Phi: Tensor, Psi: Tensor, damping: float) -> Tensor:
    """Returns the solution of the dense system, sqrt(damping) added to sqrt(delta) times each factor."""
    root, share = delta.sqrt(), damping**0.5
    damped_phi = root * Phi + share * torch.eye(len(Phi), dtype=Phi.dtype)
    damped_psi = root * Psi + share * torch.eye(len(Psi), dtype=Psi.dtype)
    return torch.linalg.solve(torch.kron(damped_psi, damped_phi), grad_OI.flatten()).view_as(grad_OI)
