"""Structures of a root K whose K K^T takes the place of an inverse, and of the part of a factor that moves it.

Each structure is closed under products, so that K stays in it. A value has the same shape whether it stands for a part
of a factor X, for K, or for a step m of K: sums of values are those of the matrices.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from ngd_dist.factors.diagonal import Diagonal
from ngd_dist.factors.form import FactorForm, Form

__all__ = ["DiagonalStructure", "Structure", "per_block"]


class Structure(FactorForm):
    """The form of a factor of which only the part that a root of this structure needs is made. Source: [L23].

    In `left` and `right` the root K stands for the inverse K K^T. No inversion makes it: there is no `problem` of it.
    """

    @property
    def inverse(self) -> Form:
        """Returns the form of a root: unlike an inverse it is not symmetric, and travels whole."""
        return Form(self.shape)

    @abstractmethod
    def identity(self, scale_B: Tensor) -> Tensor:
        """Returns the root scale * I of each block."""

    @abstractmethod
    def conjugated(self, root: Tensor, value: Tensor) -> Tensor:
        """Returns the projection of K^T X K on the structure."""

    @abstractmethod
    def squared(self, root: Tensor) -> Tensor:
        """Returns the projection of K^T K on the structure."""

    @abstractmethod
    def product(self, root: Tensor, step: Tensor) -> Tensor:
        """Returns K m."""

    @abstractmethod
    def bound(self, step: Tensor) -> Tensor:
        """Returns a number that no eigenvalue of m exceeds in size, [B]: of the norms that take O(n^2), the least."""

    def left(self, inverse: Tensor, matrix_BnI: Tensor) -> Tensor:
        return self.right(matrix_BnI.mT, inverse).mT.contiguous()


class DiagonalStructure(Structure, Diagonal):
    """Diagonals, [B, n]."""

    def identity(self, scale_B: Tensor) -> Tensor:
        return scale_B.unsqueeze(-1).repeat(1, self.shape[-1])

    def conjugated(self, root: Tensor, value: Tensor) -> Tensor:
        return root.square() * value

    def squared(self, root: Tensor) -> Tensor:
        return root.square()

    def product(self, root: Tensor, step: Tensor) -> Tensor:
        return root * step

    def bound(self, step: Tensor) -> Tensor:
        return step.abs().amax(-1)

    def right(self, matrix_BOn: Tensor, inverse: Tensor) -> Tensor:
        return matrix_BOn * inverse.square().unsqueeze(-2)

    @property
    def inverse_flops(self) -> int:
        """Of a step of the root: ten passes over it."""
        return 10 * self.shape[0] * self.shape[-1]


def per_block(number_B: Tensor, like: Tensor) -> Tensor:
    """Returns a number of each block in the dimensions of a value, [B, 1, ...]."""
    return number_B.view(-1, *[1] * (like.ndim - 1))


def least_norm(matrices: Tensor) -> Tensor:
    """Returns the lesser of the Frobenius norm and the largest row sum, [...], of matrices [..., n, m]."""
    frobenius = torch.linalg.vector_norm(matrices, dim=(-2, -1))
    return torch.minimum(frobenius, matrices.abs().sum(-1).amax(-1))
