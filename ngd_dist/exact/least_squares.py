"""The direction d that minimises |J d + r|² + damping |d - start|², J of rows that are spread over the ranks.

Both forms give it in float64, and the same one: d = start - (JᵀJ + damping I)⁻¹ Jᵀ(r + J start), or by Woodbury
d = start - Jᵀ(JJᵀ + damping I)⁻¹ (r + J start). If the damping is 0, the inverse is the pseudo-inverse, and without a
start d is the shortest of all minimisers. The exact natural gradient of [Zhang, Martens & Grosse, arXiv 1905.10961],
theta - lr Jᵀ(JJᵀ)⁻¹ (u - y), is theta + lr d with r = u - y and damping 0.

Shapes: N rows of all ranks, n of this rank, W weights.
"""

from abc import ABC, abstractmethod
from itertools import pairwise

import torch
from torch import Tensor

from ngd_dist.distributed.comm import Communicator
from ngd_dist.errors import ConfigError, NonFiniteError
from ngd_dist.factors.triangle import pack, unpack

__all__ = ["KernelForm", "LeastSquares", "WeightsForm", "solve"]


class LeastSquares(ABC):
    """One least-squares problem. Rows are added, then summed over the ranks once, then solved.

    >>> problem = WeightsForm(2, Communicator())
    >>> problem.add(torch.eye(2), torch.tensor([1.0, 2.0]))
    >>> problem.reduce()
    >>> problem.direction(damping=0.0)
    tensor([-1., -2.], dtype=torch.float64)
    """

    def __init__(self, num_weights: int, comm: Communicator, *, device: torch.device | None = None) -> None:
        self._size, self._comm, self._device = num_weights, comm, device

    @abstractmethod
    def add(self, J_nW: Tensor, r_n: Tensor) -> None:
        """Takes rows of this rank, of any dtype."""

    @abstractmethod
    def reduce(self) -> None:
        """Collective. Brings the rows of all ranks together; no row may be added after it."""

    @property
    @abstractmethod
    def value(self) -> float:
        """|r|² and the constants c, over all ranks, once reduced."""

    @abstractmethod
    def direction(self, *, damping: float, rcond: float | None = None, start: Tensor | None = None) -> Tensor:
        """Collective. Returns d, [W], the same bits on all ranks.

        start: [W]; None is 0. Raises, on all ranks: NonFiniteError if J or r is not finite; ConfigError if the damping
        is 0 and J is 0.
        """


class WeightsForm(LeastSquares):
    """Solves with JᵀJ, [W, W]: for more rows than weights, of which only the added ones are ever held."""

    def __init__(self, num_weights: int, comm: Communicator, *, device: torch.device | None = None) -> None:
        super().__init__(num_weights, comm, device=device)
        # JᵀJ, Jᵀr and, in the last entry of one more row, |r|²: a single buffer for a single collective
        self._sums = torch.zeros(num_weights + 1, num_weights + 1, dtype=torch.float64, device=device)

    def add(self, J_nW: Tensor, r_n: Tensor) -> None:
        rows = torch.cat([J_nW.double(), r_n.double().unsqueeze(1)], dim=1)
        self._sums.addmm_(rows.T, rows)

    def tilt(self, slope_W: Tensor, constant: Tensor) -> None:
        """Adds 2 slopeᵀ d + constant to what d minimises: slopes of an energy need not be sums of its rows."""
        self._sums[:-1, -1] += slope_W
        self._sums[-1, :-1] += slope_W
        self._sums[-1, -1] += constant

    def reduce(self) -> None:
        if self._comm.world_size > 1:
            triangle = pack(self._sums)
            self._comm.all_reduce("exact: Gram matrix", triangle, kind="statistics")
            self._sums = unpack(triangle, len(self._sums))

    @property
    def value(self) -> float:
        return float(self._sums[-1, -1])

    def direction(self, *, damping: float, rcond: float | None = None, start: Tensor | None = None) -> Tensor:
        gram_WW, gradient_W = self._sums[:-1, :-1], self._sums[:-1, -1]
        if start is not None:
            gradient_W = gradient_W + gram_WW @ start
        direction = -solve(gram_WW, gradient_W, damping=damping, rcond=rcond)
        if start is not None:
            direction += start
        # Equal sums give equal directions on like hardware only.
        self._comm.broadcast("exact: direction", direction)
        return direction


class KernelForm(LeastSquares):
    """Solves with JJᵀ, [N, N]: for fewer rows than weights. A rank holds its rows, then all rows of its weights."""

    def __init__(self, num_weights: int, comm: Communicator, *, device: torch.device | None = None) -> None:
        super().__init__(num_weights, comm, device=device)
        self._rows: list[Tensor] = []
        self._residuals: list[Tensor] = []
        bounds = [num_weights * rank // comm.world_size for rank in range(comm.world_size + 1)]
        self._shares = [slice(*pair) for pair in pairwise(bounds)]
        self._share = self._shares[comm.rank]

    def add(self, J_nW: Tensor, r_n: Tensor) -> None:
        self._rows.append(J_nW.double())
        self._residuals.append(r_n.double())

    def reduce(self) -> None:
        comm, options = self._comm, {"dtype": torch.float64, "device": self._device}
        J_nW = torch.cat([torch.zeros(0, self._size, **options), *self._rows])  # type: ignore[arg-type]
        self._rows.clear()
        counts = torch.zeros(comm.world_size, **options)  # type: ignore[arg-type]
        counts[comm.rank] = len(J_nW)
        comm.all_reduce("exact: rows of each rank", counts)
        ns = [int(count) for count in counts.tolist()]
        width = self._share.stop - self._share.start
        arrived = comm.begin_exchange(
            "exact: Jacobian",
            [J_nW[:, share].reshape(-1) for share in self._shares],
            [n * width for n in ns],
            kind="statistics",
        ).wait()
        # All rows, of this rank's share of the weights.
        self._J_Nw = torch.cat([part.view(n, width) for part, n in zip(arrived, ns, strict=True)])
        first = sum(ns[: comm.rank])
        r_N = torch.zeros(sum(ns), **options)  # type: ignore[arg-type]
        if self._residuals:
            r_N[first : first + ns[comm.rank]] = torch.cat(self._residuals)
        self._kernel_NN, self._r_N = self._J_Nw @ self._J_Nw.T, r_N
        if comm.world_size > 1:
            sums = torch.cat([pack(self._kernel_NN), r_N])
            comm.all_reduce("exact: kernel", sums, kind="statistics")
            self._kernel_NN, self._r_N = unpack(sums[: -len(r_N)], len(r_N)), sums[-len(r_N) :]

    @property
    def value(self) -> float:
        return float(self._r_N @ self._r_N)

    def direction(self, *, damping: float, rcond: float | None = None, start: Tensor | None = None) -> Tensor:
        r_N = self._r_N
        if start is not None:
            moved_N = self._J_Nw @ start[self._share]
            self._comm.all_reduce("exact: residuals of the start", moved_N)
            r_N = r_N + moved_N
        duals_N = solve(self._kernel_NN, r_N, damping=damping, rcond=rcond)
        direction = torch.zeros(self._size, dtype=torch.float64, device=self._device)
        direction[self._share] = -(self._J_Nw.T @ duals_N)
        if start is not None:
            direction[self._share] += start[self._share]
        self._comm.all_reduce("exact: direction", direction, kind="directions")
        return direction


def solve(matrix: Tensor, vector: Tensor, *, damping: float, rcond: float | None = None) -> Tensor:
    """Returns (matrix + damping I)⁻¹ vector, for a symmetric [n, n] without negative eigenvalues, float64.

    By Cholesky if the damping is above rcond times the trace; else by eigenvalues, of which those up to rcond times the
    largest are left out. rcond is by default float64's epsilon times n.
    Raises: NonFiniteError; ConfigError if the matrix and the damping are 0.

    >>> solve(torch.diag(torch.tensor([4.0, 0.0])).double(), torch.ones(2).double(), damping=0.0)
    tensor([0.2500, 0.0000], dtype=torch.float64)
    """
    if not (matrix.isfinite().all() and vector.isfinite().all()):
        raise NonFiniteError("a residual or its derivative by the weights is NaN or infinite; no weight was changed")
    rcond = torch.finfo(matrix.dtype).eps * len(matrix) if rcond is None else rcond
    # The trace bounds the largest eigenvalue. Damping below the matrix's own rounding errors would divide by them.
    if damping > rcond * matrix.trace():
        factor, info = torch.linalg.cholesky_ex(matrix + damping * torch.eye(len(matrix)).to(matrix))
        if not info:
            return torch.cholesky_solve(vector.unsqueeze(1), factor).squeeze(1)
    values, vectors = torch.linalg.eigh(matrix)
    if damping == 0 and not values[-1] > 0:
        raise ConfigError(
            "no residual depends on any weight to first order, and with damping 0 such a system has no solution: check "
            "that the residuals call the network, or set damping > 0"
        )
    inverses = torch.where(values > rcond * values[-1], 1 / (values + damping), 0.0)
    solution: Tensor = vectors @ (inverses * (vectors.T @ vector))
    return solution
