"""Generalised Gauss-Newton matrices and output Hessians by automatic differentiation, one sample at a time."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


def output_hessian(loss: Callable[[Tensor], Tensor], output: Tensor) -> Tensor:
    """Returns d^2 loss / d output^2, [D, D], D the numbers in the output."""
    flat = torch.autograd.functional.hessian(lambda z: loss(z.view_as(output)), output.detach().flatten())
    assert isinstance(flat, Tensor)
    return flat


def output_jacobian(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the model's output for x and its derivative [D, n] with respect to all parameters, one after another."""
    parameters = list(model.parameters())
    output = model(x)
    rows = []
    for number in output.flatten():
        pieces = torch.autograd.grad(number, parameters, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, pieces, strict=True)]
        rows.append(torch.cat([g.flatten() for g in filled]))
    return output.detach(), torch.stack(rows)


def gauss_newton(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    """Returns (1/N) sum_n J_n^T H_n J_n, [n, n], of a model that treats samples one by one."""
    total: Tensor | None = None
    for n in range(x.shape[0]):
        output, jacobian = output_jacobian(model, x[n : n + 1])
        hessian = output_hessian(lambda z, n=n: loss(z, y[n : n + 1]), output)
        block = jacobian.T @ hessian @ jacobian
        total = block if total is None else total + block
    assert total is not None
    return total / x.shape[0]


def flattened(values: Sequence[Tensor]) -> Tensor:
    """Returns all numbers in one vector, in the order of `gauss_newton`'s rows if given in `parameters()` order."""
    return torch.cat([value.detach().flatten() for value in values])
