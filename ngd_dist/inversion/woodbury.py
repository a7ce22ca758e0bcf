"""The damped inverse of X^T X with rows X [B, R, n] and R < n, without forming X^T X.

Woodbury's identity: (X^T X + d I)^-1 = (I - Z^T Z) / d with Z = L^-1 X and L L^T = X X^T + d I. The solve is R x R, and
a product with the inverse takes 4R operations per entry instead of the 2n of a dense inverse.
"""

import torch
from torch import Tensor

__all__ = ["damped_inverse", "product_left", "product_right"]


def damped_inverse(rows_BRn: Tensor, damping_B: Tensor) -> tuple[Tensor, Tensor]:
    """Returns Z, [B, R, n], and the info of the Cholesky factorisation, [B]: not 0 if it failed. damping_B: [B]."""
    gram = rows_BRn @ rows_BRn.mT
    gram.diagonal(dim1=-2, dim2=-1).add_(damping_B.unsqueeze(-1))
    triangle, info = torch.linalg.cholesky_ex(gram)
    return torch.linalg.solve_triangular(triangle, rows_BRn, upper=False), info


def product_right(matrix_BOn: Tensor, Z_BRn: Tensor) -> Tensor:
    """Returns M (I - Z^T Z), [B, O, n]: d times the product with the damped inverse."""
    return torch.baddbmm(matrix_BOn, matrix_BOn @ Z_BRn.mT, Z_BRn, alpha=-1)


def product_left(Z_BRn: Tensor, matrix_BnI: Tensor) -> Tensor:
    """Returns (I - Z^T Z) M, [B, n, I]: d times the product with the damped inverse."""
    return torch.baddbmm(matrix_BnI, Z_BRn.mT, Z_BRn @ matrix_BnI, alpha=-1)
