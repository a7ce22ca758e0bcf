"""Pure functions on rows and Kronecker factors.

Shapes: N samples, P positions (1 when dense), I inputs (+1 with bias), O outputs.
"""

from torch import Tensor

__all__ = ["precondition", "second_moment"]


def second_moment(rows_NPD: Tensor, scale: float) -> Tensor:
    """Returns scale * sum over n and p of r r^T, [D, D], in the dtype of the rows."""
    rows = rows_NPD.flatten(0, 1)
    return (rows.T @ rows).mul_(scale)


def precondition(A_inverse_II: Tensor, G_inverse_OO: Tensor, grad_OI: Tensor) -> Tensor:
    """Returns G^-1 grad A^-1, [O, I]: (A (x) G)^-1 vec(grad) for a row-major gradient. Source: [MG15]."""
    return G_inverse_OO @ grad_OI @ A_inverse_II
