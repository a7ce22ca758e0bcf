"""Metrics on states: functions rho on a regular grid in one or two dimensions, as densities or solutions of a PDE are.

A metric is given by a root L, with <u, v> = (L u)^T (L v) for changes u and v of the state. All sums carry the volume
of a cell, so that they approach integrals as the grid gets finer. k: cells of the grid, in row-major order; e: rows of
L; c: columns. Walls reflect: no mass flows through the edge of the grid.

Everything is computed in the dtype of the state; float64 is advised, and Wasserstein needs it.

Source: [NLY22]; the discretisation is ours.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ngd_dist.errors import ConfigError, NonFiniteError

__all__ = ["L2", "FisherRao", "Grid", "Metric", "Root", "SideBySide", "Sobolev", "Wasserstein"]

# In float64 the Cholesky factor of this many cells takes 0.8 GB, and the dense matrices before it some 5 GB.
MAX_CELLS_2D = 10_000


@dataclass(frozen=True)
class Grid:
    """A regular grid of cells: their number and their width along each of one or two dimensions.

    Raises: ConfigError for anything else.

    >>> Grid((4, 5), (0.5, 0.2)).cells
    20
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.shape) not in (1, 2) or min(self.shape) < 2:
            raise ConfigError(f"a grid has one or two dimensions of at least 2 cells, got shape {self.shape}")
        if len(self.spacing) != len(self.shape) or not all(math.isfinite(h) and h > 0 for h in self.spacing):
            raise ConfigError(
                f"a grid of shape {self.shape} needs {len(self.shape)} spacings > 0, got spacing {self.spacing}"
            )

    @property
    def cells(self) -> int:
        """The number of cells."""
        return math.prod(self.shape)

    @property
    def volume(self) -> float:
        """The volume of a cell."""
        return math.prod(self.spacing)


@dataclass(frozen=True)
class Root:
    """The linear map L of a metric at one state. Each call takes one vector, or a matrix of columns."""

    # L u: [k] -> [e], or [k, c] -> [e, c]
    apply: Callable[[Tensor], Tensor]
    # L^T w: [e] -> [k], or [e, c] -> [k, c]
    adjoint: Callable[[Tensor], Tensor]
    # (L^T)^+ g for a derivative g of a loss by the state: [k] -> [e]
    dual: Callable[[Tensor], Tensor]


class Metric(ABC):
    """A metric on the states of a grid."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    @property
    def cells(self) -> int:
        """The length k of a state."""
        return self.grid.cells

    def at(self, rho: Tensor) -> Root:
        """Returns the root of the metric at the state rho [k].

        Raises: ConfigError for a state of another grid, or one that the metric doesn't cover; NonFiniteError.

        >>> root = L2(Grid((3,), (0.25,))).at(torch.ones(3))
        >>> root.apply(torch.tensor([2.0, 0.0, -2.0]))
        tensor([ 1.,  0., -1.])
        """
        if rho.shape != (self.cells,):
            raise ConfigError(f"the metric is on states of shape ({self.cells},), got {tuple(rho.shape)}; flatten them")
        if not rho.is_floating_point():
            raise ConfigError(f"the metric is on real floating-point states, got {rho.dtype}")
        if not bool(rho.isfinite().all()):
            raise NonFiniteError(f"{int((~rho.isfinite()).sum())} of {len(rho)} cells of the state are NaN or infinite")
        return self._root(rho.detach())

    @abstractmethod
    def _root(self, rho: Tensor) -> Root: ...


class L2(Metric):
    """<u, v> = integral of u v. With a squared-error loss its direction is that of Gauss-Newton."""

    def _root(self, rho: Tensor) -> Root:
        return _diagonal(torch.full_like(rho, math.sqrt(self.grid.volume)))


class FisherRao(Metric):
    """<u, v> = integral of u v / rho, for densities rho >= 0: the Fisher information of a family of densities.

    floor: densities below it count as the floor, since 1 / rho has no bound.
    """

    def __init__(self, grid: Grid, *, floor: float = 1e-10) -> None:
        super().__init__(grid)
        self.floor = _checked_floor(floor)

    def _root(self, rho: Tensor) -> Root:
        rho = _floored(rho, self.floor, "Fisher-Rao")
        return _diagonal((self.grid.volume / rho).sqrt())


class Sobolev(Metric):
    """<u, v> = integral of u (I - Laplacian)^order v: H^s for s = order in [-1, 1].

    Above 0 the metric weighs fine features more, below 0 coarse ones. A cosine transform along each dimension, as a
    dense matrix: O(n^2) per row of n cells. Raises: ConfigError for another order.
    """

    def __init__(self, grid: Grid, *, order: float) -> None:
        super().__init__(grid)
        if not -1 <= order <= 1:
            raise ConfigError(f"the order of a Sobolev metric is in [-1, 1], got {order}")
        self.order = order

    def _root(self, rho: Tensor) -> Root:
        bases = [_cosines(n).to(rho) for n in self.grid.shape]
        frequencies = torch.zeros(self.grid.shape, dtype=torch.float64)
        for axis, (n, h) in enumerate(zip(self.grid.shape, self.grid.spacing, strict=True)):
            of_axis = (2 / h * torch.sin(torch.pi * torch.arange(n, dtype=torch.float64) / (2 * n))) ** 2
            frequencies += of_axis.view([-1 if a == axis else 1 for a in range(len(self.grid.shape))])
        weights = math.sqrt(self.grid.volume) * (1 + frequencies) ** (self.order / 2)

        def times(weights: Tensor, u: Tensor) -> Tensor:
            columns = u.reshape(*self.grid.shape, -1)
            columns = _along_axes(bases, columns) * weights.unsqueeze(-1)
            return _along_axes([basis.T for basis in bases], columns).reshape(u.shape)

        weights = weights.to(rho)
        forth = lambda u: times(weights, u)  # noqa: E731  L is symmetric
        return Root(apply=forth, adjoint=forth, dual=lambda g: times(1 / weights, g))


class Wasserstein(Metric):
    """<u, v> = integral of rho grad(phi_u) . grad(phi_v), where -div(rho grad phi_u) = u: Wasserstein-2, for rho >= 0.

    L u is the v of least norm with B v = u, B = -div(sqrt(rho) .). It moves mass and sees no change of the total: the
    mean of u is left out. If the model changes the total mass, normalise its state, or the direction need not descend.
    At rho = 1 this is the homogeneous H^-1.

    floor: densities below it count as the floor. In one dimension L is a cumulative sum. In two, a
    dense Cholesky factor of the weighted Laplacian of all cells, O(k^3) per state, for at most 10,000 cells.
    Raises: ConfigError for a larger grid.
    """

    def __init__(self, grid: Grid, *, floor: float = 1e-10) -> None:
        super().__init__(grid)
        self.floor = _checked_floor(floor)
        if len(grid.shape) == 2 and grid.cells > MAX_CELLS_2D:
            raise ConfigError(
                f"Wasserstein factors a dense matrix of all cells in two dimensions, of at most {MAX_CELLS_2D} cells, "
                f"got {grid.cells}; take a coarser grid, or Sobolev(grid, order=-1)"
            )

    def _root(self, rho: Tensor) -> Root:
        rho = _floored(rho, self.floor, "Wasserstein")
        solve = self._solve_in_1d if len(self.grid.shape) == 1 else self._solve_in_2d
        scale = math.sqrt(self.grid.volume)
        roots = self._at_faces(rho).sqrt()
        apply, adjoint = solve(rho, roots)
        return Root(
            apply=lambda u: scale * apply(u),
            adjoint=lambda w: scale * adjoint(w),
            dual=lambda g: _by_row(roots, self._gradient(g)) / scale,
        )

    def _solve_in_1d(self, rho: Tensor, roots: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """Returns B^+ and its transpose. The flow through a face is the mass that is lost on its left."""
        (h,) = self.grid.spacing

        def apply(u: Tensor) -> Tensor:
            return _by_row(-h / roots, _centred(u).cumsum(0)[:-1])

        def adjoint(w: Tensor) -> Tensor:
            right_of = _by_row(-h / roots, w).flip(0).cumsum(0).flip(0)
            return _centred(torch.cat([right_of, torch.zeros_like(w[:1])]))

        return apply, adjoint

    def _solve_in_2d(self, rho: Tensor, roots: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """Returns B^+ and its transpose, from a factor of the Laplacian B B^T without its densest cell."""
        b_te = _by_row(roots, self._gradient(torch.eye(len(rho)).to(rho)))
        kept = torch.arange(len(rho), device=rho.device) != rho.argmax()
        factor, failed = torch.linalg.cholesky_ex((b_te.T @ b_te)[kept][:, kept])
        if bool(failed):
            raise ConfigError(
                f"the Laplacian weighted by densities of {rho.min():.1e} to {rho.max():.1e} is singular in "
                f"{rho.dtype}; raise the floor, now {self.floor:.1e}, or take float64"
            )

        def inverse(u: Tensor) -> Tensor:
            columns = _centred(u).reshape(len(rho), -1)
            phi = torch.zeros_like(columns)
            phi[kept] = torch.cholesky_solve(columns[kept], factor)
            return _centred(phi).reshape(u.shape)

        return (
            lambda u: _by_row(roots, self._gradient(inverse(u))),
            lambda w: inverse(self._minus_divergence(_by_row(roots, w))),
        )

    def _at_faces(self, rho: Tensor) -> Tensor:
        """Returns the mean density of the two cells at each inner face [e]; one dimension after another."""
        field = rho.reshape(self.grid.shape)
        means = [(_upper(field, axis) + _lower(field, axis)) / 2 for axis in range(field.ndim)]
        return torch.cat([mean.flatten() for mean in means])

    def _gradient(self, g: Tensor) -> Tensor:
        """Returns the differences over each inner face: [k] -> [e], or [k, c] -> [e, c]."""
        field = g.reshape(*self.grid.shape, *g.shape[1:])
        differences = [
            (_upper(field, axis) - _lower(field, axis)).flatten(0, len(self.grid.shape) - 1) / h
            for axis, h in enumerate(self.grid.spacing)
        ]
        return torch.cat(differences)

    def _minus_divergence(self, w: Tensor) -> Tensor:
        """Returns the transpose of `_gradient` times w: [e] -> [k], or [e, c] -> [k, c]."""
        out = w.new_zeros(*self.grid.shape, *w.shape[1:])
        start = 0
        for axis, h in enumerate(self.grid.spacing):
            upper, lower = _upper(out, axis), _lower(out, axis)  # views of `out`, which the sums below write to
            flows = w[start : start + math.prod(upper.shape[: len(self.grid.shape)])].reshape(upper.shape) / h
            start += math.prod(upper.shape[: len(self.grid.shape)])
            upper += flows
            lower -= flows
        return out.flatten(0, len(self.grid.shape) - 1)


class SideBySide(Metric):
    """The sum of one metric over several states, such as fields of several sources, in one vector [copies * k]."""

    def __init__(self, metric: Metric, copies: int) -> None:
        super().__init__(metric.grid)
        if copies < 1:
            raise ConfigError(f"copies must be at least 1, got {copies}")
        self.metric, self.copies = metric, copies

    @property
    def cells(self) -> int:
        return self.copies * self.metric.cells

    def _root(self, rho: Tensor) -> Root:
        roots = [self.metric.at(state) for state in rho.chunk(self.copies)]

        def each(maps: list[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
            return lambda u: torch.cat([of(part) for of, part in zip(maps, u.chunk(self.copies), strict=True)])

        return Root(each([r.apply for r in roots]), each([r.adjoint for r in roots]), each([r.dual for r in roots]))


def _diagonal(diagonal: Tensor) -> Root:
    return Root(
        apply=lambda u: _by_row(diagonal, u),
        adjoint=lambda w: _by_row(diagonal, w),
        dual=lambda g: _by_row(1 / diagonal, g),
    )


def _by_row(factors: Tensor, u: Tensor) -> Tensor:
    return factors * u if u.ndim == 1 else factors.unsqueeze(-1) * u


def _checked_floor(floor: float) -> float:
    if not (math.isfinite(floor) and floor > 0):
        raise ConfigError(f"floor must be > 0, got {floor}; the default is 1e-10")
    return floor


def _floored(rho: Tensor, floor: float, metric: str) -> Tensor:
    if bool((rho < 0).any()):
        raise ConfigError(
            f"{metric} is a metric on densities, and {int((rho < 0).sum())} of {len(rho)} cells are negative, the "
            f"least {rho.min():.3e}; for signed states take L2 or Sobolev"
        )
    return rho.clamp_min(floor)


def _centred(u: Tensor) -> Tensor:
    return u - u.mean(0)


def _upper(field: Tensor, axis: int) -> Tensor:
    return field.narrow(axis, 1, field.shape[axis] - 1)


def _lower(field: Tensor, axis: int) -> Tensor:
    return field.narrow(axis, 0, field.shape[axis] - 1)


def _cosines(n: int) -> Tensor:
    """Returns the orthonormal cosine transform [n, n] (DCT-II), whose rows are the Laplacian's eigenvectors."""
    index = torch.arange(n, dtype=torch.float64)
    basis = torch.cos(torch.pi / n * torch.outer(index, index + 0.5)) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis


def _along_axes(matrices: list[Tensor], field: Tensor) -> Tensor:
    for axis, matrix in enumerate(matrices):
        field = torch.tensordot(matrix, field, dims=([1], [axis])).movedim(0, axis)
    return field
