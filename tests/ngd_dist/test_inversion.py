"""Inverses carry their ending and an honest residual."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ngd_dist.inversion import Ending, eigen, invert


def with_condition(kappa: float, n: int = 50, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns an SPD matrix with eigenvalues spread evenly in logarithm from 1 to kappa."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q
    return (basis * torch.logspace(0, torch.tensor(kappa).log10().item(), n, dtype=torch.float64) @ basis.T).to(dtype)


@pytest.mark.parametrize("kappa", [1.0, 1e2, 1e4])
def test_float32_inverse_is_accurate_to_the_condition_number(kappa: float) -> None:
    matrix = with_condition(kappa)

    inverse = invert(matrix, torch.tensor(0.0))

    exact = torch.linalg.inv(matrix.double())
    assert inverse.ending is Ending.OK
    assert inverse.value is not None
    error = torch.linalg.norm(inverse.value.double() - exact) / torch.linalg.norm(exact)
    assert error < 10 * kappa * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("kappa", [1e2, 1e4])
def test_residual_estimates_the_full_one(kappa: float) -> None:
    matrix = with_condition(kappa)

    inverse = invert(matrix, torch.tensor(0.0))

    assert inverse.value is not None
    full = torch.linalg.norm(torch.eye(50) - matrix @ inverse.value) / 50**0.5
    assert inverse.residual == pytest.approx(float(full), rel=1.5)  # four probes: within a factor of two or so


def test_damping_is_added_to_the_diagonal() -> None:
    inverse = invert(torch.zeros(3, 3, dtype=torch.float64), torch.tensor(4.0, dtype=torch.float64))

    assert inverse.value is not None
    torch.testing.assert_close(inverse.value, torch.eye(3, dtype=torch.float64) / 4)


@pytest.mark.parametrize(
    ("matrix", "ending"),
    [
        (torch.full((3, 3), float("nan")), Ending.NON_FINITE),
        (torch.tensor([[1.0, 0], [0, float("inf")]]), Ending.NON_FINITE),
        (-torch.eye(3), Ending.NOT_POSITIVE_DEFINITE),
        (torch.zeros(3, 3), Ending.NOT_POSITIVE_DEFINITE),
    ],
)
def test_what_has_no_inverse_says_so(matrix: Tensor, ending: Ending) -> None:
    inverse = invert(matrix, torch.tensor(0.0))

    assert inverse.value is None
    assert inverse.ending is ending
    assert inverse.ending.advice


def test_an_inverse_that_rounding_spoiled_is_not_used() -> None:
    matrix = with_condition(1e10)

    inverse = invert(matrix, torch.tensor(0.0))

    assert inverse.value is None
    assert inverse.ending in (Ending.NOT_POSITIVE_DEFINITE, Ending.INACCURATE)


def test_eigh_is_tried_again_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = torch.linalg.eigh

    def fails_in_float32(matrix: Tensor, **options: Any) -> Any:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return exact(matrix, **options)

    monkeypatch.setattr(torch.linalg, "eigh", fails_in_float32)
    matrix = with_condition(1e2).unsqueeze(0)

    found = eigen(matrix)

    assert found.ending is Ending.OK
    assert found.values is not None
    assert found.vectors is not None
    rebuilt = found.vectors @ torch.diag_embed(found.values) @ found.vectors.mT
    torch.testing.assert_close(rebuilt, matrix, rtol=1e-5, atol=1e-5)


def test_an_eigendecomposition_that_never_converges_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(matrix: Tensor, **options: Any) -> Any:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)

    found = eigen(torch.eye(3).unsqueeze(0))

    assert (found.values, found.vectors, found.ending) == (None, None, Ending.NOT_CONVERGED)
    assert found.ending.advice


def test_one_bad_block_fails_its_factor() -> None:
    matrix = torch.stack([torch.eye(3), -torch.eye(3)])

    inverse = invert(matrix, torch.zeros(2))

    assert (inverse.value, inverse.ending) == (None, Ending.NOT_POSITIVE_DEFINITE)
