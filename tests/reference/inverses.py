"""Newton-Schulz inverses in emulated precision, from the formula; and matrices with a known spectrum."""

import math

import torch
from torch import Tensor


def spd(kappa: float, n: int = 256, seed: int = 0) -> Tensor:
    """Returns a symmetric float64 matrix whose eigenvalues run evenly, in logarithm, from 1 / kappa to 1."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q
    matrix = basis * torch.logspace(-math.log10(kappa), 0, n, dtype=torch.float64) @ basis.mT
    return (matrix + matrix.mT) / 2


def best_scalar(kappa: float, n: int = 256) -> Tensor:
    """Returns the multiple of I that is closest to the inverse of `spd(kappa)`: 2 / (smallest + largest)."""
    return torch.eye(n, dtype=torch.float64) * 2 / (1 + 1 / kappa)


def newton_schulz(A: Tensor, X: Tensor, iterations: int, residual: torch.dtype, update: torch.dtype) -> Tensor:
    """Returns X after X <- X (2 I - A X): the operands of each product are rounded to a dtype, sums are float32."""
    A, X = A.float(), X.float()
    eye = torch.eye(len(A))
    for _ in range(iterations):
        E = eye - A.to(residual).float() @ X.to(residual).float()
        X = X + X.to(update).float() @ E.to(update).float()
    return X


def errors(A: Tensor, X: Tensor) -> tuple[float, float]:
    """Returns ||I - A X||_2 and ||X - A^-1||_2 / ||A^-1||_2, in float64."""
    A, X = A.double(), X.double()
    exact = torch.linalg.inv(A)
    rest = torch.linalg.matrix_norm(torch.eye(len(A), dtype=torch.float64) - A @ X, 2)
    forward = torch.linalg.matrix_norm(X - exact, 2) / torch.linalg.matrix_norm(exact, 2)
    return float(rest), float(forward)
