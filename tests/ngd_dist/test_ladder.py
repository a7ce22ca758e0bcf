"""Which method is tried is a pure function of a few numbers."""

from math import inf, nan

import pytest

from ngd_dist.inversion import Ending, Method
from ngd_dist.inversion.crossover import Crossover, crossover_at, file_name, table_for
from ngd_dist.inversion.ladder import (
    Conditioning,
    Policy,
    Try,
    after,
    cold_iterations,
    ending_of,
    first,
    warm_iterations,
)

NEWTON = Policy(max_iterations=20, tolerance=1e-2)


@pytest.mark.parametrize(
    ("conditioning", "expected"),
    [
        (Conditioning(kappa=1e3, rho=0.3), Try(Method.WARM_NEWTON_SCHULZ, 2)),
        (Conditioning(kappa=1e8, rho=0.3), Try(Method.WARM_NEWTON_SCHULZ, 2)),
        (Conditioning(kappa=1e3, rho=0.95), Try(Method.NEWTON_SCHULZ, 12)),
        (Conditioning(kappa=1e3), Try(Method.NEWTON_SCHULZ, 12)),
        (Conditioning(kappa=1e6, rho=1.2), Try(Method.CHOLESKY)),
        (Conditioning(kappa=nan, rho=nan), Try(Method.CHOLESKY)),
        (Conditioning(kappa=inf), Try(Method.CHOLESKY)),
    ],
)
def test_the_cheapest_method_that_converges_is_tried_first(conditioning: Conditioning, expected: Try) -> None:
    assert first(NEWTON, conditioning) == expected


@pytest.mark.parametrize(
    ("max_iterations", "method"),
    [(0, Method.CHOLESKY), (1, Method.CHOLESKY), (2, Method.WARM_NEWTON_SCHULZ)],
)
def test_no_more_iterations_are_taken_than_are_worth_it(max_iterations: int, method: Method) -> None:
    policy = Policy(max_iterations=max_iterations, tolerance=1e-2)

    assert first(policy, Conditioning(kappa=1e3, rho=0.3)).method is method


def test_failures_lead_down_to_float64_and_end_there() -> None:
    conditioning, ending = Conditioning(kappa=1e3, rho=0.3), Ending.NOT_CONVERGED
    tried = [first(NEWTON, conditioning)]
    while (following := after(NEWTON, conditioning, tried[-1].method, ending)) is not None:
        tried.append(following)

    assert [each.method for each in tried] == [
        Method.WARM_NEWTON_SCHULZ,
        Method.NEWTON_SCHULZ,
        Method.CHOLESKY,
        Method.CHOLESKY_FLOAT64,
    ]


@pytest.mark.parametrize("ending", [Ending.OK, Ending.NON_FINITE])
@pytest.mark.parametrize("method", list(Method))
def test_nothing_is_tried_after_success_nor_on_what_is_not_finite(method: Method, ending: Ending) -> None:
    assert after(NEWTON, Conditioning(kappa=10, rho=0.1), method, ending) is None


@pytest.mark.parametrize(
    ("is_finite", "is_definite", "residual", "method", "ending"),
    [
        (True, True, 0.04, Method.CHOLESKY, Ending.OK),
        (True, True, 0.06, Method.CHOLESKY, Ending.INACCURATE),
        (True, True, nan, Method.CHOLESKY_FLOAT64, Ending.INACCURATE),
        (True, True, nan, Method.NEWTON_SCHULZ, Ending.NOT_CONVERGED),
        (True, False, 0.0, Method.CHOLESKY, Ending.NOT_POSITIVE_DEFINITE),
        (False, False, nan, Method.WARM_NEWTON_SCHULZ, Ending.NON_FINITE),
    ],
)
def test_an_ending_follows_from_three_numbers(
    is_finite: bool, is_definite: bool, residual: float, method: Method, ending: Ending
) -> None:
    assert ending_of(method, is_finite=is_finite, is_definite=is_definite, residual=residual) is ending


@pytest.mark.parametrize(("kappa", "iterations"), [(10, 5), (100, 8), (1000, 12)])
def test_iterations_from_a_multiple_of_the_identity_are_those_measured(kappa: float, iterations: int) -> None:
    assert cold_iterations(kappa, 1e-2) == iterations


@pytest.mark.parametrize(
    ("rho", "iterations"),
    [(0.033, 1), (0.097, 1), (0.10, 2), (0.14, 2), (0.158, 2), (0.32, 3), (0.41, 3), (0.43, 3), (0.58, 4)],
)
def test_iterations_from_an_old_inverse_are_those_measured(rho: float, iterations: int) -> None:
    assert abs(warm_iterations(rho, 1e-2) - iterations) <= 1


def row(n: int, batch: int, iterations: int) -> Crossover:
    return Crossover(n, batch, iterations, "float16", "split")


TABLE = (row(256, 1, 0), row(256, 8, 3), row(1024, 1, 5), row(1024, 8, 12))


@pytest.mark.parametrize(
    ("n", "batch", "iterations"),
    [
        (256, 1, 0),
        (256, 8, 3),
        (500, 1, 0),  # between two sizes the less favourable one holds
        (500, 9, 3),
        (1024, 7, 5),  # a batch of 8 was not worth as much for 7
        (1024, 100, 12),
        (255, 8, None),
        (1025, 8, None),
    ],
)
def test_a_table_promises_no_more_than_was_measured(n: int, batch: int, iterations: int | None) -> None:
    worth = crossover_at(TABLE, n, batch)

    assert (worth and worth.iterations) == iterations


def test_a_device_without_a_table_takes_cholesky() -> None:
    assert table_for("Some Unknown GPU") == ()
    assert crossover_at((), 512, 1) is None
    assert file_name("NVIDIA H200 (80GB)") == "nvidia_h200_80gb.json"
