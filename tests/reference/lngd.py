"""LNGD's Fisher block of one layer, and the quadratic model that its step length minimises, one sample at a time."""

from collections.abc import Callable

import torch
from torch import Tensor


def layer_fisher(a_NPI: Tensor, slopes_NPO: Tensor) -> Tensor:
    """Returns (1/N) sum_n sum_p diag(s'^2) (x) a a^T, [O I, O I] for a row-major gradient: eq. 3, nothing sampled."""
    total = torch.zeros((), dtype=a_NPI.dtype)
    for a_PI, slopes_PO in zip(a_NPI, slopes_NPO, strict=True):
        for a, slopes in zip(a_PI, slopes_PO, strict=True):
            total = total + torch.kron(torch.diag(slopes**2), torch.outer(a, a))
    return total / a_NPI.shape[0]


def factors(a_NPI: Tensor, slopes_NPO: Tensor) -> tuple[Tensor, Tensor]:
    """Returns Phi [I, I] and Psi [O], whose sum is 1: eq. 4 and 5."""
    Phi, Psi, total = (torch.zeros((), dtype=a_NPI.dtype) for _ in range(3))
    for a_PI, slopes_PO in zip(a_NPI, slopes_NPO, strict=True):
        for a, slopes in zip(a_PI, slopes_PO, strict=True):
            Phi = Phi + torch.outer(a, a) * slopes.dot(slopes)
            Psi = Psi + a.dot(a) * slopes**2
            total = total + a.dot(a) * slopes.dot(slopes)
    return Phi / a_NPI.shape[0], Psi / total


def direction(grad_OI: Tensor, Phi: Tensor, Psi: Tensor, low: float, high: float) -> Tensor:
    """Returns the solution of the damped dense system, its damping the mean eigenvalue of each factor in bounds."""
    damped_phi = Phi + min(max(float(Phi.trace()) / len(Phi), low), high) * torch.eye(len(Phi), dtype=Phi.dtype)
    damped_psi = Psi + min(max(float(Psi.sum()) / len(Psi), low), high)
    return torch.linalg.solve(torch.kron(torch.diag(damped_psi), damped_phi), grad_OI.flatten()).view_as(grad_OI)


def sampled_squares(activation: Callable[[Tensor], Tensor], s: Tensor, samples: int, seed: int) -> Tensor:
    """Returns the mean over draws from N(activation(s), I) of the squared derivative of -log p by s, like s."""
    generator = torch.Generator().manual_seed(seed)
    leaf = s.detach().expand(samples, *s.shape).clone().requires_grad_()
    mean = activation(leaf)
    drawn = mean.detach() + torch.randn(mean.shape, dtype=mean.dtype, generator=generator)
    return torch.autograd.grad(((drawn - mean) ** 2).sum() / 2, leaf)[0].square().mean(0)


def quadratic_model(lengths: Tensor, inner: Tensor, curvature: Tensor) -> float:
    """Returns sum_l (length^2 / 2 d^T F d - length d^T grad): the loss's change along -length d, layer by layer."""
    return float((lengths**2 / 2 * curvature - lengths * inner).sum())
