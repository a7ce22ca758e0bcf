"""Full-waveform inversion in small, under three metrics. Run: python examples/waveform.py"""

import sys

import torch
from torch import Tensor

from ngd_dist.exact.metrics import Grid, SideBySide, Sobolev
from ngd_dist.exact.state_space import Jacobian, StateSpaceNGD, implicit_jacobian

STEPS, FREQUENCY, PASSES = [int(word) for word in sys.argv[1:]] or (4, 15, 8)  # few: 576 unknowns, not all are heard
N, SOURCES, C128 = 24, 4, torch.complex128

difference, eye = N * torch.eye(N, dtype=C128).diff(dim=0), torch.eye(N, dtype=C128)
laplacian = torch.kron(difference.T @ difference, eye) + torch.kron(eye, difference.T @ difference)
right = torch.zeros(N * N, SOURCES, dtype=C128)
right[N + torch.arange(3, N, 6), torch.arange(SOURCES)] = N**2  # near the top
rows = torch.arange(2 * SOURCES * N * N).view(-1, N, N)[:, [4, N - 2]].flatten()  # two rows of receivers, in a state


def helmholtz(theta: Tensor) -> Tensor:  # the imaginary part takes energy out of the waves
    return laplacian - torch.diag((1 + 0.2j) * FREQUENCY**2 * theta.exp())


def as_state(fields: Tensor) -> Tensor:  # complex [cells, SOURCES] -> real and imaginary cells of each source
    return torch.view_as_real(fields).permute(1, 2, 0).flatten()


def as_fields(state: Tensor) -> Tensor:
    return torch.complex(*state.view(SOURCES, 2, -1).permute(1, 2, 0))


def recorded(theta: Tensor) -> Tensor:
    return as_state(torch.linalg.solve(helmholtz(theta), right))[rows]


def jacobian(theta: Tensor, _: Tensor) -> Jacobian:
    lu = torch.linalg.lu_factor(helmholtz(theta))
    solve = lambda v, **how: as_state(torch.linalg.lu_solve(*lu, as_fields(v), **how))  # noqa: E731
    equation = lambda state, theta: as_state(helmholtz(theta) @ as_fields(state) - right)  # noqa: E731
    both = {"solve": solve, "adjoint_solve": lambda w: solve(w, adjoint=True)}
    whole = implicit_jacobian(equation, solve(as_state(right)), theta, **both)
    silence = torch.zeros(2 * SOURCES * N * N, dtype=theta.dtype)
    return Jacobian(push=lambda eta: whole.push(eta)[rows], pull=lambda w: whole.pull(silence.index_copy(0, rows, w)))


x = (torch.arange(N, dtype=torch.float64) + 0.5) / N
truth = (0.5 * torch.exp(-((x - 0.5) ** 2 + (x[:, None] - 0.55) ** 2) / 0.03)).flatten()
right *= N**0.5 / recorded(truth).norm()  # sources so strong that the data's norm is 1
data = recorded(truth)
for name, order in {"H^-1": -1, "H^1": 1, "L2": 0}.items():
    metric = SideBySide(Sobolev(Grid((N,), (1 / N,)), order=order), len(data) // N)
    misfit = lambda record: 0.5 * (record - data).square().sum() / N  # noqa: E731
    optimizer = StateSpaceNGD(metric, recorded, misfit, jacobian=jacobian, lr=16, halvings=12, max_iterations=PASSES)
    theta = torch.zeros(N * N, dtype=torch.float64)
    print(f"{name:5} step 0 loss {misfit(recorded(theta)):.8f}")
    for number in range(1, STEPS + 1):
        theta = (step := optimizer.step(theta)).theta
        error = (theta - truth).norm() / truth.norm()
        print(f"{name:5} step {number} loss {step.loss:.8f}, relative error of the medium {error:.3f}")
