"""Spectra that are estimated, against dense eigenvalues in float64."""

import pytest
import torch
from torch import Tensor

from ngd_dist.inversion import Direct, Method, ToDecompose, ToInvert, reciprocal, woodbury
from ngd_dist.inversion.lanczos import STEPS, quantiles_of, tridiagonal
from ngd_dist.inversion.spectrum import QUANTILES, quantiles
from tests.support.tensors import F64

ROWS = Direct(Method.WOODBURY, woodbury)
N = 200


def problem(factor: Tensor, direct: Direct | None = None) -> ToInvert:
    return ToInvert(factor, torch.full((len(factor),), 0.1, dtype=factor.dtype), direct=direct)


def told_of(factor: Tensor, width: int | None = None, direct: Direct | None = None) -> tuple[float, ...]:
    told = tridiagonal(problem(factor, direct))
    assert told is not None
    found = quantiles_of(told, factor.shape[0] * factor.shape[1] if width is None else width)
    assert found is not None
    return found


def with_eigenvalues(values: Tensor) -> Tensor:
    draws = torch.randn(len(values), len(values), dtype=F64, generator=torch.Generator().manual_seed(1))
    basis = torch.linalg.qr(draws)[0]
    return (basis @ values.to(F64).diag() @ basis.T).unsqueeze(0)


def wishart(blocks: int, n: int) -> Tensor:
    rows = torch.randn(blocks, 2 * n, n, dtype=F64, generator=torch.Generator().manual_seed(2))
    return rows.mT @ rows / (2 * n)


def geometric(orders: int) -> Tensor:
    return 10 ** (-orders * torch.arange(N, dtype=F64) / N)


SMALL = {
    "distinct": with_eigenvalues(torch.tensor([1.0, 2.0, 3.0, 10.0, 0.5])),
    "as many rows as steps": wishart(1, STEPS),
    "one": torch.full((1, 1, 1), 2.5, dtype=F64),
    "identity": 3 * torch.eye(6, dtype=F64).unsqueeze(0),
    "multiple": with_eigenvalues(torch.tensor([2.0, 2.0, 1.0, 0.0, 0.0, 0.0])),
    "exact zeros": torch.diag(torch.tensor([1.0, 0.0, 0.0, 0.0, 2.0, 2.0], dtype=F64)).unsqueeze(0),
    "zero": torch.zeros(1, 5, 5, dtype=F64),
    "blocks": wishart(4, 4),
}


@pytest.mark.parametrize("factor", SMALL.values(), ids=SMALL)
def test_small_factor_has_its_own_eigenvalues(factor: Tensor) -> None:
    true = quantiles(torch.linalg.eigvalsh(factor)).tolist()

    assert told_of(factor) == pytest.approx(true, rel=1e-8, abs=1e-12)


LARGE = {
    "wishart": wishart(1, N),
    "blocks": wishart(25, 8),
    "two orders": with_eigenvalues(geometric(2)),
    "six orders": with_eigenvalues(geometric(6)),
    "one over k": with_eigenvalues(1 / torch.arange(1, N + 1)),
}


@pytest.mark.parametrize("factor", LARGE.values(), ids=LARGE)
def test_large_factor_is_estimated_within_the_bounds_that_are_told(factor: Tensor) -> None:
    true = torch.linalg.eigvalsh(factor).flatten()

    least, *quartiles, largest = told_of(factor)

    assert 0.99 * float(true.max()) <= largest <= float(true.max()) * (1 + 1e-9)
    assert least >= float(true.min()) * (1 - 1e-9)
    for share, value in zip(QUANTILES[1:-1], quartiles, strict=True):
        below = float((true <= value).double().mean())
        # Those below a thousandth of the largest are not told apart.
        is_unresolved = value < 1e-3 * largest and float(true.quantile(share)) < value
        assert abs(below - share) <= 0.15 or is_unresolved, (share, below)


@pytest.mark.parametrize(("count", "is_exact"), [(10, True), (60, False)], ids=["few", "many"])
@pytest.mark.parametrize("form", ["rows", "their products"])
def test_rows_in_place_of_a_matrix_leave_zeros(form: str, *, count: int, is_exact: bool) -> None:
    rows = torch.randn(1, count, N, dtype=F64, generator=torch.Generator().manual_seed(3))
    true = torch.linalg.eigvalsh(rows.mT @ rows)

    told = told_of(rows, N, ROWS) if form == "rows" else told_of(rows @ rows.mT, N)

    assert told[:4] == pytest.approx((0.0, 0.0, 0.0, 0.0) if count == 10 else (0.0, 0.0, 0.0, told[3]))
    assert told[-1] == pytest.approx(float(true.max()), rel=1e-8 if is_exact else 1e-2)
    if not is_exact:
        assert float((true <= told[3]).double().mean()) == pytest.approx(0.75, abs=0.15)


def test_scale_leaves_float32_its_digits() -> None:
    factor = wishart(1, 40)

    told = told_of((factor * 1e-25).float())

    assert told[-1] == pytest.approx(1e-25 * told_of(factor.float())[-1], rel=1e-3)
    assert told[-1] == pytest.approx(1e-25 * float(torch.linalg.eigvalsh(factor).max()), rel=1e-2)


def test_same_factor_is_told_the_same_and_leaves_the_users_random_numbers_alone() -> None:
    state = torch.get_rng_state()

    assert told_of(LARGE["wishart"]) == told_of(LARGE["wishart"])
    assert torch.equal(torch.get_rng_state(), state)


def test_factor_that_is_not_finite_or_decomposed_has_no_estimate() -> None:
    told = tridiagonal(problem(torch.full((1, 3, 3), torch.nan)))

    assert told is not None
    assert quantiles_of(told, 3) is None
    assert tridiagonal(ToDecompose(LARGE["wishart"])) is None
    assert tridiagonal(problem(torch.ones(1, 3), Direct(Method.RECIPROCAL, reciprocal))) is None
