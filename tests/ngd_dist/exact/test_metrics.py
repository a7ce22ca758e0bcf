"""Each metric is its dense matrix, its maps are adjoint to each other, and states that it doesn't cover are refused."""

import math

import pytest
import torch
from torch import Tensor

from ngd_dist.errors import ConfigError, NonFiniteError
from ngd_dist.exact.metrics import L2, FisherRao, Grid, Metric, SideBySide, Sobolev, Wasserstein

F64 = torch.float64
GRIDS = [Grid((17,), (0.3,)), Grid((5, 6), (0.5, 0.2))]
METRICS = {
    "l2": L2,
    "fisher_rao": FisherRao,
    "h1": lambda grid: Sobolev(grid, order=1),
    "h-1/2": lambda grid: Sobolev(grid, order=-0.5),
    "h-1": lambda grid: Sobolev(grid, order=-1),
    "wasserstein": Wasserstein,
    "side_by_side": lambda grid: SideBySide(Wasserstein(grid), 2),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def density(metric: Metric) -> Tensor:
    return 0.1 + random(metric.cells, seed=1).abs()


def differences(n: int, h: float) -> Tensor:
    return (torch.eye(n, dtype=F64)[1:] - torch.eye(n, dtype=F64)[:-1]) / h


def gradient_matrix(grid: Grid) -> Tensor:
    """Returns the differences over all inner faces [e, k], by Kronecker products."""
    if len(grid.shape) == 1:
        return differences(grid.shape[0], grid.spacing[0])
    (rows, columns), (h_y, h_x) = grid.shape, grid.spacing
    eye = lambda n: torch.eye(n, dtype=F64)  # noqa: E731
    return torch.cat(
        [torch.kron(differences(rows, h_y), eye(columns)), torch.kron(eye(rows), differences(columns, h_x))]
    )


def dense_metric(name: str, grid: Grid, rho: Tensor) -> Tensor:
    """Returns L^T L [k, k], from the definition of the metric."""
    gradient = gradient_matrix(grid)
    if name == "l2":
        matrix = torch.eye(grid.cells, dtype=F64)
    elif name == "fisher_rao":
        matrix = torch.diag(1 / rho)
    elif name.startswith("h"):
        order = {"h1": 1.0, "h-1/2": -0.5, "h-1": -1.0}[name]
        values, vectors = torch.linalg.eigh(torch.eye(grid.cells, dtype=F64) + gradient.T @ gradient)
        matrix = vectors @ torch.diag(values**order) @ vectors.T
    else:
        at_faces = 0.5 * (gradient != 0).to(F64) @ rho
        matrix = torch.linalg.pinv(gradient.T @ torch.diag(at_faces) @ gradient, hermitian=True)
    return matrix * grid.volume


@pytest.fixture(params=GRIDS, ids=["1d", "2d"])
def grid(request: pytest.FixtureRequest) -> Grid:
    return request.param


@pytest.mark.parametrize("name", [name for name in METRICS if name != "side_by_side"])
def test_metric_is_its_dense_matrix(name: str, grid: Grid) -> None:
    metric = METRICS[name](grid)
    rho, z = density(metric), random(metric.cells, 3)
    y = metric.at(rho).apply(z)

    expected = z.T @ dense_metric(name, grid, rho) @ z

    torch.testing.assert_close(y.T @ y, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", METRICS)
def test_maps_are_adjoint_and_dual_is_the_transposed_pseudo_inverse(name: str, grid: Grid) -> None:
    metric = METRICS[name](grid)
    root = metric.at(density(metric))
    u, g = random(metric.cells), random(metric.cells, seed=3)
    w = random(len(root.apply(u)), seed=2)
    l_ek = root.apply(torch.eye(metric.cells, dtype=F64))

    size = float(root.apply(u).norm() * w.norm())
    assert abs(float(root.apply(u) @ w - u @ root.adjoint(w))) <= 1e-12 * size
    torch.testing.assert_close(root.dual(g), torch.linalg.pinv(l_ek.T) @ g, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", METRICS)
def test_columns_are_mapped_one_by_one(name: str, grid: Grid) -> None:
    metric = METRICS[name](grid)
    root, u = metric.at(density(metric)), random(metric.cells, 3)
    w = root.apply(u)

    torch.testing.assert_close(w, torch.stack([root.apply(column) for column in u.T], 1))
    torch.testing.assert_close(root.adjoint(w), torch.stack([root.adjoint(column) for column in w.T], 1))
    torch.testing.assert_close(root.dual(u), torch.stack([root.dual(column) for column in u.T], 1))


def test_wasserstein_sees_no_change_of_the_total_mass(grid: Grid) -> None:
    root = Wasserstein(grid).at(density(Wasserstein(grid)))
    u = random(grid.cells)

    torch.testing.assert_close(root.apply(u + 7), root.apply(u), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(root.apply(torch.ones(grid.cells, dtype=F64)).norm().item(), 0.0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.7, 1.0, 1.6])
def test_metrics_of_a_gaussian_are_those_of_theory(sigma: float) -> None:
    grid = Grid((400,), (0.05,))
    x = torch.arange(400, dtype=F64) * 0.05 - 10
    rho = torch.exp(-0.5 * (x / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    by_mean = x / sigma**2 * rho

    wasserstein, fisher_rao = (
        kind(grid).at(rho).apply(by_mean).square().sum().item() for kind in (Wasserstein, FisherRao)
    )

    # The grid's errors, and those of the floor in the tails: 1.4e-6 and 2e-8 at most.
    assert wasserstein == pytest.approx(1, abs=1e-5)
    assert fisher_rao == pytest.approx(1 / sigma**2, rel=1e-6)


@pytest.mark.parametrize("kind", [FisherRao, Wasserstein])
def test_negative_density_is_refused(kind: type[Metric]) -> None:
    rho = torch.ones(17, dtype=F64)
    rho[3] = -0.25

    with pytest.raises(ConfigError, match=r"1 of 17 cells are negative, the least -2.500e-01; .* take L2 or Sobolev"):
        kind(GRIDS[0]).at(rho)


@pytest.mark.parametrize("kind", [FisherRao, Wasserstein])
@pytest.mark.parametrize("grid", GRIDS, ids=["1d", "2d"])
def test_empty_cells_count_as_the_floor(kind: type[Metric], grid: Grid) -> None:
    rho = torch.ones(grid.cells, dtype=F64)
    rho[:4] = 0

    assert kind(grid).at(rho).apply(random(grid.cells)).isfinite().all()


def test_state_that_does_not_fit_is_refused() -> None:
    metric = L2(GRIDS[1])

    with pytest.raises(ConfigError, match=r"\(30,\), got \(5, 6\); flatten"):
        metric.at(torch.ones(5, 6))
    with pytest.raises(ConfigError, match=r"torch\.int64"):
        metric.at(torch.ones(30, dtype=torch.int64))
    with pytest.raises(NonFiniteError, match="1 of 30 cells"):
        metric.at(torch.ones(30).index_fill(0, torch.tensor([2]), math.nan))


def test_grid_or_setting_that_is_none_is_refused() -> None:
    for shape, spacing in [((3, 3, 3), (1.0,) * 3), ((1,), (1.0,)), ((), ())]:
        with pytest.raises(ConfigError, match="one or two dimensions"):
            Grid(shape, spacing)
    for spacing in [(1.0, 1.0), (0.0,), (math.nan,)]:
        with pytest.raises(ConfigError, match="1 spacings > 0"):
            Grid((4,), spacing)
    with pytest.raises(ConfigError, match=r"\[-1, 1\], got 2"):
        Sobolev(GRIDS[0], order=2)
    with pytest.raises(ConfigError, match="floor must be > 0, got 0"):
        Wasserstein(GRIDS[0], floor=0)
    with pytest.raises(ConfigError, match="at most 10000 cells, got 40000"):
        Wasserstein(Grid((200, 200), (1.0, 1.0)))
    with pytest.raises(ConfigError, match="copies must be at least 1, got 0"):
        SideBySide(L2(GRIDS[0]), 0)
