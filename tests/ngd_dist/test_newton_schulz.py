"""Newton-Schulz reaches the accuracy of float32 with 16-bit updates, and what diverges is caught."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ngd_dist.config import CholeskyInversion, InversionChoice, NewtonSchulzInversion
from ngd_dist.factors.diagonal import Diagonal
from ngd_dist.inversion import Ending, Inverse, Method, ToInvert, solve
from ngd_dist.inversion.ladder import cold_iterations
from ngd_dist.inversion.newton_schulz import bounds, equilibrated, iterate, newton_schulz, spectral_radius
from tests.reference import inverses
from tests.reference.inverses import best_scalar, errors, spd

NEWTON = NewtonSchulzInversion(update_dtype="float16", residual="split")
# ||I - A X||_2 and the forward error, design table 12.3: n = 256, best scalar start.
TABLE = {1e2: (4.5e-6, 2.3e-6), 1e3: (2.8e-5, 1.4e-5), 1e4: (2.2e-4, 1.0e-4), 3e4: (7.9e-4, 2.8e-4)}


def problem(kappa: float, n: int = 64, seed: int = 0, old: Tensor | None = None) -> ToInvert:
    """Returns one of which the damping is the smallest eigenvalue."""
    factor = spd(kappa, n, seed) - torch.eye(n, dtype=torch.float64) / kappa
    return ToInvert(factor.float().unsqueeze(0), torch.tensor([1 / kappa]), old)


def damped(given: ToInvert) -> Tensor:
    return given.factor[0].double() + given.damping.double() * torch.eye(given.factor.shape[-1], dtype=torch.float64)


def inverse(given: ToInvert, choice: InversionChoice = NEWTON) -> Inverse:
    found = solve({"": given}, choice)[""]
    assert isinstance(found, Inverse)
    return found


@pytest.mark.parametrize("residual", ["float32", "split"])
@pytest.mark.parametrize(
    ("update", "kappa"),
    [*((torch.float16, kappa) for kappa in TABLE), (torch.bfloat16, 1e3), (torch.float32, 1e4)],
)
def test_only_the_residual_needs_float32(update: torch.dtype, kappa: float, residual: str) -> None:
    A, steps = spd(kappa), cold_iterations(kappa, 1e-3) + 1

    X = iterate(A.float()[None], best_scalar(kappa).float()[None], steps, update_dtype=update, residual=residual)[0]

    rest, forward = errors(A, X)
    assert rest < 1.5 * TABLE[kappa][0]  # another matrix than the table's, of the same spectrum
    assert forward < 1.5 * TABLE[kappa][1]


@pytest.mark.parametrize(("dtype", "kappa", "rest"), [(torch.float16, 1e2, 9.2e-3), (torch.float16, 1e3, 7.6e-2)])
def test_a_residual_in_16_bits_costs_what_the_reference_shows(dtype: torch.dtype, kappa: float, rest: float) -> None:
    A, steps = spd(kappa), cold_iterations(kappa, 1e-3)

    rounded = inverses.newton_schulz(A, best_scalar(kappa), steps, dtype, dtype)

    assert errors(A, rounded)[0] == pytest.approx(rest, rel=0.3)
    assert errors(A, rounded)[0] > 1000 * TABLE[kappa][0]  # which is why the library has no such setting


@pytest.mark.parametrize(("kappa", "iterations"), [(10, 5), (100, 8), (1000, 12)])
def test_iterations_to_one_per_cent_are_those_of_the_table(kappa: float, iterations: int) -> None:
    A, X = spd(kappa), best_scalar(kappa)
    taken = 0
    while errors(A, X)[0] >= 1e-2:
        X = iterate(A.float()[None], X.float()[None], 1, update_dtype=torch.float16, residual="split")[0]
        taken += 1

    assert abs(taken - iterations) <= 1


@pytest.mark.parametrize("kappa", [10.0, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("update_dtype", ["float16", "bfloat16", "float32"])
def test_a_cold_start_gives_an_accurate_inverse(kappa: float, update_dtype: str) -> None:
    choice = NewtonSchulzInversion.model_validate({"update_dtype": update_dtype})
    given = problem(kappa)

    found = inverse(given, choice)

    assert found.ending is Ending.OK
    assert found.method is (Method.CHOLESKY if (kappa, update_dtype) == (1e4, "bfloat16") else Method.NEWTON_SCHULZ)
    assert found.value is not None
    assert errors(damped(given), found.value[0])[1] < 1e-3
    assert torch.equal(found.value, found.value.mT)


def test_an_old_inverse_that_is_close_is_the_start() -> None:
    given, later = problem(100), problem(100, seed=0)
    drifted = given.factor + 0.02 * torch.diag_embed(torch.linspace(-0.1, 0.1, 64)).unsqueeze(0)
    old = inverse(given).value

    found = inverse(ToInvert(drifted, later.damping, old))

    assert found.method is Method.WARM_NEWTON_SCHULZ
    assert found.iterations < inverse(given).iterations
    assert found.value is not None
    assert errors(damped(ToInvert(drifted, later.damping)), found.value[0])[1] < 2e-3  # the tolerance is 1e-3


def test_the_guard_refuses_an_old_inverse_of_another_matrix() -> None:
    old = inverse(problem(100, seed=1)).value
    given = problem(100, seed=2)
    assert old is not None
    exact = torch.linalg.eigvals(torch.eye(64, dtype=torch.float64) - damped(given) @ old[0].double()).abs().max()

    found = inverse(ToInvert(given.factor, given.damping, old))

    assert float(exact) > 1
    assert float(spectral_radius(damped(given)[None], old.double())) == pytest.approx(float(exact), rel=0.2)
    assert found.method is Method.NEWTON_SCHULZ
    assert found.ending is Ending.OK


def test_what_diverges_past_the_guard_is_tried_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    old = inverse(problem(100, seed=1)).value
    given = problem(100, seed=2)

    monkeypatch.setattr("ngd_dist.inversion.solver.spectral_radius", lambda matrix, old: torch.tensor([0.5]))
    found = inverse(ToInvert(given.factor, given.damping, old))

    assert found.ending is Ending.OK
    assert found.method is Method.NEWTON_SCHULZ
    assert found.residual < 1e-3


def test_equilibration_rounds_nothing_and_halves_the_range() -> None:
    rows = torch.logspace(-12, 12, 64, dtype=torch.float32)
    matrix = (spd(10, 64).float() * rows * rows[:, None]).unsqueeze(0)

    inner, scale = equilibrated(matrix)

    assert torch.equal(inner / (scale[..., None] * scale[..., None, :]), matrix)
    assert float(inner.diagonal(dim1=-2, dim2=-1).min()) >= 0.25
    assert float(inner.diagonal(dim1=-2, dim2=-1).max()) < 2
    assert torch.equal(scale, torch.exp2(scale.log2().round()))


def test_rows_of_any_scale_are_inverted_in_float16() -> None:
    rows = torch.logspace(-8, 8, 64)  # an inverse from 1e-16 to 1e16, where float16 ends at 6.6e4
    matrix = (spd(10, 64).float() * rows * rows[:, None]).unsqueeze(0)

    value, _ = newton_schulz(matrix, torch.zeros(1), None, 9, update_dtype=torch.float16, residual="split")

    scaled = value[0].double() * torch.outer(rows, rows)
    exact = torch.linalg.inv(spd(10, 64))
    torch.testing.assert_close(scaled, exact, rtol=0, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize("kappa", [1e2, 1e4])
def test_bounds_hold_the_spectrum(kappa: float) -> None:
    given = problem(kappa)
    inner, scale = equilibrated(damped(given)[None])

    bound = bounds(inner, scale, given.damping.double())

    values = torch.linalg.eigvalsh(inner[0])
    assert float(bound.low) <= float(values.min()) * (1 + 1e-6)  # the factor was rounded to float32
    assert float(values.max()) <= float(bound.high) <= 1.2 * float(values.max())


@pytest.fixture
def _tf32() -> Iterator[None]:
    allowed = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = allowed


@pytest.mark.usefixtures("_tf32")
def test_products_are_exact_inside_and_as_the_user_set_them_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def look(factor: Tensor) -> None:
        seen.append(torch.backends.cuda.matmul.fp32_precision)

    monkeypatch.setattr("ngd_dist.inversion.solver._run", lambda batch: look(batch) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        solve({"": problem(10)})

    assert seen == ["ieee"]
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


CHOICES = [NEWTON, CholeskyInversion(), CholeskyInversion(dtype="float64")]


@pytest.mark.parametrize("choice", CHOICES)
def test_a_batch_gives_what_one_by_one_does(choice: InversionChoice) -> None:
    blocks = torch.cat([problem(50, 32, seed).factor for seed in (7, 8)])
    problems = {
        "small": problem(1e2, 32),
        "large": problem(1e3, 48),
        "ill": problem(1e6, 32, 1),
        "blocks": ToInvert(blocks, torch.tensor([0.02, 0.03])),
        "diagonal": Diagonal((2, 32)).problem(torch.rand(2, 32), torch.tensor([0.1, 0.2]), None),
    }

    together = solve(problems, choice)

    for name, given in problems.items():
        alone, found = inverse(given, choice), together[name]
        assert isinstance(found, Inverse)
        assert (alone.method, alone.ending) == (found.method, found.ending)
        assert alone.value is not None
        assert found.value is not None
        torch.testing.assert_close(found.value, alone.value, rtol=2e-3, atol=2e-3 * float(alone.value.abs().max()))
        assert found.value.untyped_storage().nbytes() == found.value.nbytes  # does not keep the batch alive


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(
    ("bad", "damping", "endings"),
    [
        (torch.full((8, 8), math.nan), 0.1, {Ending.NON_FINITE}),
        (torch.eye(8) * math.inf, 0.1, {Ending.NON_FINITE}),
        (torch.zeros(8, 8), 0.0, {Ending.NOT_POSITIVE_DEFINITE}),
        (-torch.eye(8), 0.1, {Ending.NOT_POSITIVE_DEFINITE}),
        (spd(1e8, 8).float(), 0.0, {Ending.NOT_POSITIVE_DEFINITE, Ending.INACCURATE}),  # rounding decides which
    ],
)
def test_a_bad_factor_fails_alone(bad: Tensor, damping: float, endings: set[Ending], choice: InversionChoice) -> None:
    problems = {
        "good": problem(10, 8),
        "bad": ToInvert(torch.stack([torch.eye(8), bad]), torch.full((2,), damping), torch.eye(8).expand(2, 8, 8)),
    }

    found = solve(problems, choice)

    assert found["good"].ending is Ending.OK
    assert isinstance(found["bad"], Inverse)
    assert found["bad"].value is None
    assert found["bad"].ending in endings


def test_float64_saves_what_float32_loses() -> None:
    given = problem(2e7)

    found = inverse(given, CholeskyInversion())

    assert found.method is Method.CHOLESKY_FLOAT64
    assert found.ending is Ending.OK
