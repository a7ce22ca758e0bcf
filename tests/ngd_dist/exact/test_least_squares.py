"""Both forms of the least-squares direction are the dense minimiser, and refuse what has none."""

import pytest
import torch
from torch import Tensor

from ngd_dist.config import GridSearch
from ngd_dist.distributed.comm import Communicator
from ngd_dist.errors import ConfigError, NonFiniteError
from ngd_dist.exact.least_squares import KernelForm, LeastSquares, WeightsForm
from ngd_dist.exact.line_search import best_length

FORMS = [WeightsForm, KernelForm]
DAMPING = 1e-3


def rows(count: int, weights: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    J = torch.randn(count, weights, dtype=torch.float64, generator=generator)
    if rank is not None:
        J = J[:, :rank] @ torch.randn(rank, weights, dtype=torch.float64, generator=generator)
    return J, torch.randn(count, dtype=torch.float64, generator=generator)


def problem(form: type[LeastSquares], J: Tensor, r: Tensor, pieces: int = 1) -> LeastSquares:
    found = form(J.shape[1], Communicator())
    for some_J, some_r in zip(J.chunk(pieces), r.chunk(pieces), strict=True):
        found.add(some_J, some_r)
    found.reduce()
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_direction_is_the_damped_minimiser(form: type[LeastSquares], shape: tuple[int, int]) -> None:
    J, r = rows(*shape)
    start = torch.arange(shape[1], dtype=torch.float64)

    direction = problem(form, J, r, pieces=3).direction(damping=DAMPING, start=start)

    damped = torch.cat([J, DAMPING**0.5 * torch.eye(shape[1], dtype=torch.float64)])
    target = torch.cat([-r, DAMPING**0.5 * start])
    torch.testing.assert_close(
        direction, torch.linalg.lstsq(damped, target, driver="gelsd").solution, rtol=1e-8, atol=0
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (9, 9)])
def test_without_damping_it_is_the_shortest_minimiser(form: type[LeastSquares], shape: tuple[int, int]) -> None:
    J, r = rows(*shape, rank=3)

    direction = problem(form, J, r).direction(damping=0.0)

    torch.testing.assert_close(direction, torch.linalg.lstsq(J, -r, driver="gelsd").solution, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_squared_is_the_sum_of_squared_residuals(form: type[LeastSquares]) -> None:
    J, r = rows(7, 4)

    assert problem(form, J, r).value == pytest.approx(float(r @ r), rel=1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_damping_too_small_for_cholesky_falls_back_to_eigenvalues(form: type[LeastSquares]) -> None:
    J, r = rows(9, 9, rank=3)

    direction = problem(form, J, r).direction(damping=1e-300)

    torch.testing.assert_close(direction, torch.linalg.lstsq(J, -r, driver="gelsd").solution, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_a_jacobian_of_zeros_is_refused_without_damping(form: type[LeastSquares]) -> None:
    J, r = torch.zeros(4, 3), torch.ones(4)

    with pytest.raises(ConfigError, match="no residual depends on any weight"):
        problem(form, J, r).direction(damping=0.0)

    assert problem(form, J, r).direction(damping=1.0).tolist() == [0, 0, 0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_jacobian_that_is_not_finite_is_refused(form: type[LeastSquares], bad: float) -> None:
    J, r = rows(4, 3)
    J[1, 1] = bad

    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        problem(form, J, r).direction(damping=1.0)


def best(losses: list[float]) -> float:
    grid = GridSearch(count=len(losses) - 1)
    return best_length(lambda lengths: torch.tensor(losses), 2.0, grid, device=torch.device("cpu"))[0]


def test_line_search_takes_the_length_of_the_least_loss() -> None:
    assert best([3.0, torch.nan, 1.0, -torch.inf, 2.0]) == 1.0  # of 2, 1, 1/2 and 1/4


def test_line_search_takes_no_step_if_none_is_better() -> None:
    assert best([3.0, 3.0, torch.nan, torch.inf]) == 0.0


@pytest.mark.parametrize(("least", "calls"), [(1.0, 1), (2.0**-3, 2), (2.0**-6, 2), (2.0**-7, 3)])
def test_line_search_goes_on_while_shorter_lengths_do_better(least: float, calls: int) -> None:
    asked = list[torch.Tensor]()

    def losses(lengths: torch.Tensor) -> torch.Tensor:
        asked.append(lengths)
        return (lengths - least) ** 2

    length, _ = best_length(losses, 1.0, GridSearch(group=4), device=torch.device("cpu"))

    assert length == least
    assert len(asked) == calls
    assert [len(lengths) for lengths in asked] == [5, 4, 4][:calls]
