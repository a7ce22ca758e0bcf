"""Derivatives of a network by its inputs in one forward pass, for layer-wise methods on physics-informed losses.

A derivative that torch.autograd.grad takes runs backward through the layers, where `NGD` measures nothing. In a forward
pass a layer sees the value and its derivatives as rows of one input, which are positions to every method.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ngd_dist.errors import ConfigError
from ngd_dist.layers.jet import JetLinear

__all__ = ["JetLinear", "Jets", "jets"]


class Jets(NamedTuple):
    """At N points: value [N, O], first and second derivatives along each of D directions, [N, D, O]."""

    value: Tensor
    first: Tensor
    second: Tensor


def jets(model: nn.Sequential, x: Tensor, directions: Tensor | None = None) -> Jets:
    """Returns the network's values and its derivatives along directions, differentiable by the weights.

    model: `JetLinear` layers and elementwise activations, nested `nn.Sequential` among them. x: [N, d].
    directions: [D, d], of any length; None: the d coordinates. A mixed derivative u_xy is half of the second derivative
    along (1, 1) less those along x and y. The model itself is not called, but its layers are.
    Raises: ConfigError for a plain nn.Linear, or directions of another dimension.
    Source: Taylor mode of second order, as [D24] advises.

    >>> model = nn.Sequential(JetLinear(2, 8), nn.Tanh(), JetLinear(8, 1)).double()
    >>> u = jets(model, torch.rand(5, 2).double())
    >>> laplacian = u.second.sum(1)
    >>> laplacian.shape
    torch.Size([5, 1])
    >>> along = jets(model, torch.rand(5, 2).double(), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    >>> mixed = (along.second[:, 2] - along.second[:, :2].sum(1)) / 2
    >>> mixed.shape
    torch.Size([5, 1])
    """
    dim = x.shape[1]
    directions = torch.eye(dim) if directions is None else directions
    if directions.ndim != 2 or directions.shape[1] != dim or not len(directions):
        raise ConfigError(f"directions must be [D > 0, {dim}] as x is [N, {dim}], got {list(directions.shape)}")
    first = directions.to(x).expand(len(x), *directions.shape)
    rows = torch.cat([x.unsqueeze(1), first, torch.zeros_like(first)], dim=1)
    count = len(directions)
    value, first, second = _through(model, rows, count).split([1, count, count], dim=1)
    return Jets(value.squeeze(1), first, second)


def _through(module: nn.Module, rows: Tensor, count: int) -> Tensor:
    """Returns the rows [N, 1 + 2 D, O] behind a module, of those before it, [N, 1 + 2 D, I]."""
    if isinstance(module, nn.Sequential):
        for inner in module:
            rows = _through(inner, rows, count)
        return rows
    if isinstance(module, JetLinear):
        linear: Tensor = module(rows)
        return linear
    if any(True for _ in module.parameters()):
        raise ConfigError(f"jets go through JetLinear and elementwise activations, got {module}; replace it")
    value, first, second = rows.split([1, count, count], dim=1)
    with torch.enable_grad():
        at = value if value.requires_grad else value.detach().requires_grad_()
        y = module(at)
        (slope,) = torch.autograd.grad(y.sum(), at, create_graph=True)
        (curvature,) = torch.autograd.grad(
            slope.sum(), at, create_graph=True, allow_unused=True, materialize_grads=True
        )
    return torch.cat([y, slope * first, curvature * first**2 + slope * second], dim=1)
