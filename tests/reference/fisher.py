"""Exact Fisher and Gauss-Newton blocks by automatic differentiation, one sample at a time."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def sample_gradients(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    """Returns, per parameter, the gradients of each sample's own loss: [N, *shape]."""
    rows: list[list[Tensor]] = []
    for n in range(x.shape[0]):
        value = loss(model(x[n : n + 1]), y[n : n + 1])
        rows.append([g.detach() for g in torch.autograd.grad(value, list(model.parameters()))])
    return [torch.stack(columns) for columns in zip(*rows, strict=True)]


def block(rows: Tensor) -> Tensor:
    """Returns (1/N) sum_n v_n v_n^T of the flattened rows."""
    flat = rows.flatten(1)
    return flat.T @ flat / flat.shape[0]


def gauss_newton_blocks(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Returns, per parameter, (1/N) sum_n J_n^T J_n: the Gauss-Newton block for the loss 1/2 ||f(x) - y||^2."""
    blocks: list[Tensor] = []
    for index, _ in enumerate(model.parameters()):
        total: Tensor | None = None
        for n in range(x.shape[0]):
            out = model(x[n : n + 1]).flatten()
            rows = [
                torch.autograd.grad(value, list(model.parameters()), retain_graph=True)[index].flatten()
                for value in out
            ]
            jacobian = torch.stack(rows)
            total = jacobian.T @ jacobian + (0 if total is None else total)
        assert total is not None
        blocks.append(total / x.shape[0])
    return blocks


def damped_kfac_step(grad_OI: Tensor, A: Tensor, G: Tensor, damping: float) -> Tensor:
    """Returns the direction with damping split by pi, through the dense Kronecker product and one linear solve."""
    pi = ((A.trace() / A.shape[0]) / (G.trace() / G.shape[0])).sqrt()
    damped_a = A + pi * damping**0.5 * torch.eye(A.shape[0], dtype=A.dtype)
    damped_g = G + damping**0.5 / pi * torch.eye(G.shape[0], dtype=G.dtype)
    # Row-major vec: G is the outer factor.
    return torch.linalg.solve(torch.kron(damped_g, damped_a), grad_OI.flatten()).view_as(grad_OI)
