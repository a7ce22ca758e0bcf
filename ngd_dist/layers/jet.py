"""A linear layer of jets: a value and its derivatives along dimension 1, of which the value alone gets the bias."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ngd_dist.layers.linear import Linear

__all__ = ["Jet", "JetLinear"]


class JetLinear(nn.Linear):
    """`nn.Linear` that also takes jets x [N, J, I]: x[:, 0] is a value and gets the bias, the rest are derivatives.

    A derivative of W h + b is W times that of h. Inputs [N, I] are values, as of `nn.Linear`, whose state it loads.

    >>> layer = JetLinear(1, 1)
    >>> jet = torch.tensor([[[2.0], [1.0]]])  # x and dx/dx at x = 2
    >>> bool(torch.equal(layer(jet)[:, 0], layer(jet[:, 0]))), bool(torch.equal(layer(jet)[:, 1], layer.weight))
    (True, True)
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 3:
            return super().forward(x)
        y = F.linear(x, self.weight)
        return y if self.bias is None else y + _firsts(y) * self.bias


class Jet(Linear):
    """The parts of a jet are positions [E23], and the input that stands for the bias is 1 for the value, 0 for others.

    So the factors are sums over the jet, as [D24] has them for the Gauss-Newton matrix of a
    differential operator.
    """

    def _with_ones(self, a_BNPI: Tensor) -> Tensor:
        if self._bias is None:
            return a_BNPI
        return torch.cat([a_BNPI, _firsts(a_BNPI).expand(*a_BNPI.shape[:-1], 1)], dim=-1)


def _firsts(x: Tensor) -> Tensor:
    """Returns [P, 1]: 1 for the first entry of the last dimension but one of x, 0 for all others."""
    firsts = x.new_zeros(x.shape[-2], 1)
    firsts[0] = 1
    return firsts
