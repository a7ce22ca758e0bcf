"""Square roots of matrices: both methods against the definition."""

import pytest
import torch
from torch import Tensor

from ngd_dist.inversion.square_roots import square_roots

METHODS = ["eigh", "newton_schulz"]


def matrices(condition: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns two symmetric matrices with eigenvalues from 1 / condition to 1, and from 10 / condition to 10."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(2, 12, 12, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), 12, dtype=torch.float64)
    matrix = (q * values) @ q.mT * torch.tensor([1.0, 10.0], dtype=torch.float64).view(2, 1, 1)
    return ((matrix + matrix.mT) / 2).to(dtype)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("condition", [1.0, 47.0, 1e4])
def test_roots_are_those_of_the_definition(method: str, condition: float) -> None:
    matrix = matrices(condition)

    root, inverse = square_roots(matrix, method)

    eye = torch.eye(12, dtype=matrix.dtype).expand_as(matrix)
    bound = 1e-14 * condition
    torch.testing.assert_close(root @ root, matrix, rtol=0, atol=10 * bound)
    torch.testing.assert_close(root @ inverse, eye, rtol=0, atol=bound)


def test_iterations_in_float32_reach_its_accuracy() -> None:
    matrix = matrices(1e3, torch.float32)

    root, inverse = square_roots(matrix, "newton_schulz")

    exact = square_roots(matrix.double())
    assert float((root - exact.root).norm() / exact.root.norm()) < 1e-5
    assert float((inverse - exact.inverse).norm() / exact.inverse.norm()) < 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrong", [torch.nan, -1.0])
def test_a_matrix_without_a_root_gives_no_number(method: str, wrong: float) -> None:
    matrix = torch.eye(3).unsqueeze(0) * wrong

    assert not square_roots(matrix, method).inverse.isfinite().all()
