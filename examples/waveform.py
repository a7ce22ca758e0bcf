"""Full-waveform inversion in small, under several metrics. Run: python examples/waveform.py"""

import sys

import torch
from torch import Tensor

from ngd_dist.exact.metrics import L2, Grid, SideBySide, Sobolev
from ngd_dist.exact.state_space import Jacobian, StateSpaceNGD, implicit_jacobian

STEPS = int(sys.argv[1]) if sys.argv[1:] else 4
FREQUENCY = float(sys.argv[2]) if sys.argv[2:] else 15.0
N, SOURCES, LOSS_OF_ENERGY, F64 = 24, 4, 0.2, torch.float64
LINE = Grid((N,), (1 / N,))
METRICS = {"H^-1": Sobolev(LINE, order=-1), "H^1": Sobolev(LINE, order=1), "L2": L2(LINE)}

difference, eye = N * torch.eye(N, dtype=F64).diff(dim=0), torch.eye(N, dtype=F64)
laplacian = torch.kron(difference.T @ difference, eye) + torch.kron(eye, difference.T @ difference)
right = torch.zeros(2, N, N, SOURCES, dtype=F64)
right[0, 1, torch.arange(3, N, 6), torch.arange(SOURCES)] = N**2  # near the top
right = right.flatten(0, 2)
heard = torch.zeros(2, N, N, SOURCES, dtype=torch.bool)
heard[:, [4, N - 2]] = True  # two rows of receivers, for the real and the imaginary part of each source's field
rows = heard.movedim(3, 0).flatten().nonzero().squeeze(1)  # places in a state of all fields


def residual(fields: Tensor, theta: Tensor) -> Tensor:
    """Returns -Laplacian u - (1 + i LOSS_OF_ENERGY) FREQUENCY^2 exp(theta) u - source, of all sources in one vector."""
    real, imaginary = fields.view(SOURCES, 2, -1).unbind(1)
    mass = FREQUENCY**2 * theta.exp()
    real, imaginary = (
        real @ laplacian - mass * (real - LOSS_OF_ENERGY * imaginary),
        imaginary @ laplacian - mass * (imaginary + LOSS_OF_ENERGY * real),
    )
    return torch.stack([real, imaginary], 1).flatten() - right.T.flatten()


def factors(theta: Tensor) -> tuple[Tensor, Tensor]:
    mass = torch.diag(FREQUENCY**2 * theta.exp())
    real, imaginary = laplacian - mass, LOSS_OF_ENERGY * mass
    return torch.linalg.lu_factor(torch.cat([torch.cat([real, imaginary], 1), torch.cat([-imaginary, real], 1)]))


def solve(lu: tuple[Tensor, Tensor], state: Tensor, *, adjoint: bool = False) -> Tensor:
    return torch.linalg.lu_solve(*lu, state.view(SOURCES, -1).T.contiguous(), adjoint=adjoint).T.flatten()


def recorded(theta: Tensor) -> Tensor:
    return solve(factors(theta), right.T.flatten())[rows]


def jacobian(theta: Tensor, _: Tensor) -> Jacobian:
    lu = factors(theta)
    fields = solve(lu, right.T.flatten())
    whole = implicit_jacobian(
        residual,
        fields,
        theta,
        solve=lambda v: solve(lu, v),
        adjoint_solve=lambda w: solve(lu, w, adjoint=True),
    )
    return Jacobian(
        push=lambda eta: whole.push(eta)[rows],
        pull=lambda w: whole.pull(torch.zeros_like(fields).index_copy(0, rows, w)),
    )


y, x = torch.meshgrid(*2 * [(torch.arange(N, dtype=F64) + 0.5) / N], indexing="ij")
truth = (0.5 * torch.exp(-((x - 0.5) ** 2 + (y - 0.55) ** 2) / 0.03)).flatten()
right *= N**0.5 / recorded(truth).norm()  # sources so strong that the data's norm is 1
data = recorded(truth)


def misfit(record: Tensor) -> Tensor:
    return 0.5 * (record - data).square().sum() / N


for name, metric in METRICS.items():
    optimizer = StateSpaceNGD(
        SideBySide(metric, len(rows) // N),
        recorded,
        misfit,
        jacobian=jacobian,
        lr=16,
        halvings=12,
        max_iterations=int(sys.argv[3]) if sys.argv[3:] else 8,  # cut short: 576 unknowns, and few of them are heard
    )
    theta = torch.zeros(N * N, dtype=F64)
    print(f"{name:5} step 0 loss {misfit(recorded(theta)):.8f}")
    for _ in range(STEPS):
        step = optimizer.step(theta)
        theta = step.theta
    error = (theta - truth).norm() / truth.norm()
    print(f"{name:5} step {STEPS} loss {step.loss:.8f}, relative error of the medium {error:.2f}")
