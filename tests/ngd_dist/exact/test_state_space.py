"""Directions are the dense solutions of their least-squares problems, explicit and implicit; steps lower the loss."""

import math

import pytest
import torch
from torch import Tensor

from ngd_dist.errors import ConfigError, NonFiniteError
from ngd_dist.exact.metrics import L2, FisherRao, Grid, Metric, Root, Sobolev, Wasserstein
from ngd_dist.exact.state_space import (
    Jacobian,
    StateSpaceNGD,
    direction,
    implicit_jacobian,
    iterative_direction,
    lsqr,
)

F64 = torch.float64
GRID = Grid((6, 7), (0.3, 0.4))
CELLS, PARAMETERS = GRID.cells, 8
METRICS = {"l2": L2(GRID), "fisher_rao": FisherRao(GRID), "h-1": Sobolev(GRID, order=-1), "w2": Wasserstein(GRID)}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def products(z: Tensor) -> Jacobian:
    return Jacobian(push=lambda eta: z @ eta, pull=lambda w: z.T @ w)


@pytest.fixture(params=METRICS)
def root(request: pytest.FixtureRequest) -> Root:
    return METRICS[request.param].at(0.2 + random(CELLS, seed=1).abs())


@pytest.fixture
def z() -> Tensor:
    columns = random(CELLS, PARAMETERS, seed=2)
    return columns - columns.mean(0)


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_directions_solve_the_dense_system(root: Root, z: Tensor, damping: float) -> None:
    gradient = random(CELLS, seed=3)
    y = root.apply(z)

    expected = -torch.linalg.solve(y.T @ y + damping * torch.eye(PARAMETERS, dtype=F64), z.T @ gradient)

    torch.testing.assert_close(direction(z, gradient, root, damping=damping), expected, rtol=1e-9, atol=1e-11)
    iterated = iterative_direction(products(z), gradient, root, damping=damping, tolerance=1e-13)
    assert iterated.has_converged
    torch.testing.assert_close(iterated.x, expected, rtol=1e-7, atol=1e-9)


def test_rank_deficient_jacobian_gives_the_shortest_minimiser(root: Root, z: Tensor) -> None:
    gradient = random(CELLS, seed=3)
    deficient = torch.cat([z, z[:, :3] @ random(3, 2, seed=4)], 1)
    y = root.apply(deficient)

    expected = -torch.linalg.pinv(y, rtol=1e-12) @ root.dual(gradient)

    torch.testing.assert_close(direction(deficient, gradient, root), expected, rtol=1e-8, atol=1e-10)
    iterated = iterative_direction(products(deficient), gradient, root, tolerance=1e-13)
    torch.testing.assert_close(iterated.x, expected, rtol=1e-6, atol=1e-8)


def test_more_parameters_than_cells(root: Root) -> None:
    z = random(CELLS, CELLS + 5, seed=5)
    gradient = random(CELLS, seed=3)

    expected = -torch.linalg.pinv(root.apply(z), rtol=1e-12) @ root.dual(gradient)

    torch.testing.assert_close(direction(z, gradient, root), expected, rtol=1e-7, atol=1e-9)


def test_rcond_leaves_out_what_is_weak() -> None:
    root = L2(Grid((2,), (1.0,))).at(torch.ones(2, dtype=F64))
    z, gradient = torch.diag(torch.tensor([1.0, 1e-3], dtype=F64)), torch.ones(2, dtype=F64)

    torch.testing.assert_close(direction(z, gradient, root).tolist(), [-1.0, -1000.0])
    torch.testing.assert_close(direction(z, gradient, root, rcond=1e-2).tolist(), [-1.0, 0.0])


def test_jacobian_of_zeros_gives_no_direction(root: Root) -> None:
    gradient = random(CELLS)
    zeros = torch.zeros(CELLS, 3, dtype=F64)

    assert direction(zeros, gradient, root).tolist() == [0.0, 0.0, 0.0]
    assert iterative_direction(products(zeros), gradient, root).x.tolist() == [0.0, 0.0, 0.0]


def test_direction_that_is_cut_short_descends(root: Root, z: Tensor) -> None:
    gradient = random(CELLS, seed=3)

    for iterations in (1, 2, 4):
        cut = iterative_direction(products(z), gradient, root, max_iterations=iterations, tolerance=1e-15)

        assert cut.iterations == iterations
        assert not cut.has_converged
        assert float(cut.x @ (z.T @ gradient)) < 0


def test_lsqr_takes_thousands_of_unknowns() -> None:
    a = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=F64) + 0.5
    b = random(4000)

    solution = lsqr(lambda x: a * x, lambda w: a * w, b, tolerance=1e-12)

    # Condition 3: the error falls by (3 - 1) / (3 + 1) per iteration, and 2^-40 is 1e-12.
    assert solution.has_converged
    assert solution.iterations < 45
    torch.testing.assert_close(solution.x, b / a, rtol=1e-9, atol=1e-10)


class Elliptic:
    """-(theta rho')' + rho = 1 on a line of 24 cells, theta = exp of 23 log-conductances at the faces."""

    def __init__(self) -> None:
        self.grid = Grid((24,), (1 / 24,))
        differences = (torch.eye(24, dtype=F64)[1:] - torch.eye(24, dtype=F64)[:-1]) * 24
        self.differences, self.source = differences, torch.linspace(0, 1, 24, dtype=F64)

    def matrix(self, theta: Tensor) -> Tensor:
        return self.differences.T @ (theta.exp().unsqueeze(1) * self.differences) + torch.eye(24, dtype=F64)

    def state(self, theta: Tensor) -> Tensor:
        return torch.linalg.solve(self.matrix(theta), self.source)

    def residual(self, rho: Tensor, theta: Tensor) -> Tensor:
        return self.matrix(theta) @ rho - self.source

    def jacobian(self, theta: Tensor, rho: Tensor) -> Jacobian:
        matrix = self.matrix(theta)
        return implicit_jacobian(
            self.residual,
            rho,
            theta,
            solve=lambda v: torch.linalg.solve(matrix, v),
            adjoint_solve=lambda w: torch.linalg.solve(matrix.T, w),
        )


@pytest.mark.parametrize("kind", [L2, FisherRao, Wasserstein])
def test_implicit_direction_is_the_explicit_one(kind: type[Metric]) -> None:
    problem = Elliptic()
    theta, target = 0.3 * random(23), problem.state(torch.zeros(23, dtype=F64))
    loss = lambda rho: 0.5 * (rho - target).square().sum()  # noqa: E731
    settings = {"damping": 1e-4, "max_iterations": 400, "tolerance": 1e-14}

    explicit = StateSpaceNGD(kind(problem.grid), problem.state, loss, **settings)
    implicit = StateSpaceNGD(kind(problem.grid), problem.state, loss, jacobian=problem.jacobian, **settings)

    torch.testing.assert_close(implicit.direction(theta), explicit.direction(theta), rtol=1e-6, atol=1e-9)


def test_implicit_products_are_those_of_the_jacobian() -> None:
    problem, theta = Elliptic(), 0.3 * random(23)
    z = torch.func.jacrev(problem.state)(theta)

    jacobian = problem.jacobian(theta, problem.state(theta))

    torch.testing.assert_close(jacobian.push(random(23, seed=1)), z @ random(23, seed=1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(jacobian.pull(random(24, seed=2)), z.T @ random(24, seed=2), rtol=1e-10, atol=1e-12)


def test_wasserstein_moves_a_gaussian_in_one_step() -> None:
    x = torch.arange(400, dtype=F64) * 0.05 - 10

    def gaussian(theta: Tensor) -> Tensor:
        return torch.exp(-0.5 * (x - theta[0]) ** 2) / math.sqrt(2 * math.pi)

    def loss(rho: Tensor) -> Tensor:  # half the squared Wasserstein distance to the same bell at 2
        return 0.5 * ((rho * x).sum() * 0.05 - 2) ** 2

    step = StateSpaceNGD(Wasserstein(Grid((400,), (0.05,))), gaussian, loss).step(torch.tensor([-1.0], dtype=F64))

    assert step.length == 1
    assert step.theta.item() == pytest.approx(2, abs=3e-5)  # the grid's error of G, at most 1e-5, times a way of 3
    assert step.loss < 1e-9


@pytest.mark.parametrize("chunk_size", [None, 1, 5])
def test_chunks_of_the_jacobian_change_nothing(chunk_size: int | None) -> None:
    problem, theta = Elliptic(), 0.3 * random(23)

    optimizer = StateSpaceNGD(L2(problem.grid), problem.state, lambda rho: rho.square().sum(), chunk_size=chunk_size)
    whole = StateSpaceNGD(L2(problem.grid), problem.state, lambda rho: rho.square().sum())

    # Condition of Y: 1e4 here.
    torch.testing.assert_close(optimizer.direction(theta), whole.direction(theta), rtol=1e-9, atol=1e-11)


def test_no_length_lowers_the_loss_at_the_minimum() -> None:
    optimizer = StateSpaceNGD(L2(Grid((3,), (1.0,))), lambda theta: theta, lambda rho: rho.square().sum())

    step = optimizer.step(torch.zeros(3, dtype=F64))

    assert (step.length, step.loss, step.theta.tolist()) == (0.0, 0.0, [0.0, 0.0, 0.0])


def test_trials_without_a_finite_loss_are_passed_over() -> None:
    def loss(rho: Tensor) -> Tensor:
        return (rho.square() + torch.where(rho < 0.4, math.nan, 0.0)).sum()

    step = StateSpaceNGD(L2(Grid((2,), (1.0,))), lambda theta: theta, loss).step(torch.ones(2, dtype=F64))

    assert step.length == 0.25  # the direction is -2: to -1, 0 and, at a quarter, 0.5


def test_settings_that_contradict_are_refused() -> None:
    metric, identity = L2(Grid((2,), (1.0,))), lambda theta: theta
    root = metric.at(torch.ones(2))

    with pytest.raises(ConfigError, match="damping must be >= 0, got -1"):
        direction(torch.ones(2, 1), torch.ones(2), root, damping=-1)
    with pytest.raises(ConfigError, match=r"got \(2, 1\) and \(3,\)"):
        direction(torch.ones(2, 1), torch.ones(3), root)
    with pytest.raises(ConfigError, match="set damping instead"):
        StateSpaceNGD(metric, identity, torch.sum, jacobian=lambda *_: products(torch.eye(2)), rcond=1e-3)
    with pytest.raises(ConfigError, match="halvings >= 0, got 1 and -1"):
        StateSpaceNGD(metric, identity, torch.sum, lr=1, halvings=-1)
    with pytest.raises(ConfigError, match="max_iterations >= 1"):
        lsqr(identity, identity, torch.ones(2), max_iterations=0)
    with pytest.raises(ConfigError, match="one vector of parameters"):
        StateSpaceNGD(metric, identity, torch.sum).step(torch.ones(2, 1))
    with pytest.raises(ConfigError, match="one equation per cell"):
        implicit_jacobian(
            lambda rho, theta: theta, torch.ones(3), torch.ones(2), solve=identity, adjoint_solve=identity
        )


def test_numbers_that_are_not_finite_are_named() -> None:
    metric = L2(Grid((2,), (1.0,)))
    root, nan = metric.at(torch.ones(2)), torch.tensor([1.0, math.nan])

    with pytest.raises(NonFiniteError, match="the Jacobian has 1 entries"):
        direction(nan.unsqueeze(1), torch.ones(2), root)
    with pytest.raises(NonFiniteError, match="the gradient by the state has 1"):
        direction(torch.ones(2, 1), nan, root)
    with pytest.raises(NonFiniteError, match="linear solve"):
        lsqr(lambda x: x * math.inf, lambda w: w, torch.ones(2))
    with pytest.raises(NonFiniteError, match="1 of 2 cells"):
        StateSpaceNGD(metric, lambda theta: theta, torch.sum).direction(nan)
    with pytest.raises(NonFiniteError, match="the start of the step is nan"):
        StateSpaceNGD(metric, lambda theta: theta, lambda rho: rho.sum() * math.nan).step(torch.ones(2))


def test_a_jacobian_whose_square_vanishes_gives_a_finite_direction() -> None:
    root = L2(Grid((2,), (1.0,))).at(torch.ones(2, dtype=F64))

    eta = direction(torch.tensor([[1e-170], [0.0]], dtype=F64), torch.tensor([1e-10, 0.0], dtype=F64), root)

    torch.testing.assert_close(eta, torch.tensor([-1e160], dtype=F64))


def test_line_search_looks_at_every_length() -> None:
    def loss(rho: Tensor) -> Tensor:  # falls on the whole way, and is lowest in a narrow valley near 1 / 64
        return (-rho - 2 * torch.exp(-(((rho - 1 / 64) / 0.004) ** 2))).sum()

    optimizer = StateSpaceNGD(L2(Grid((2,), (1.0,))), lambda theta: theta.expand(2), loss)

    step = optimizer.step(torch.zeros(1, dtype=F64))

    assert step.length == 2.0**-6
    assert step.loss < -2 * 1.9
