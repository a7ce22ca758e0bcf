"""Natural gradients of a loss of a state, f(rho(theta)), as least-squares problems in the space of states.

Z = d rho / d theta is the Jacobian, L the root of a metric at rho, Y = L Z. The direction is the eta that brings the
change of the state nearest to steepest descent in that metric,

    eta = argmin |Y eta + b|^2,  b = (L^T)^+ df/drho,  which is -G^+ df/dtheta with G = Y^T Y,

and G is never formed: it would square the condition number. k: cells of the state, p: parameters, e: rows of L.

Start at `StateSpaceNGD`. Source: [NLY22].
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ngd_dist.config.exact import GridSearch
from ngd_dist.errors import ConfigError, NonFiniteError
from ngd_dist.exact.line_search import best_length
from ngd_dist.exact.metrics import Metric, Root

__all__ = [
    "Jacobian",
    "Solution",
    "StateSpaceNGD",
    "Step",
    "direction",
    "implicit_jacobian",
    "iterative_direction",
    "lsqr",
]


@dataclass(frozen=True)
class Jacobian:
    """Z by its products, for models whose Z [k, p] is too large to form."""

    # Z eta: [p] -> [k]
    push: Callable[[Tensor], Tensor]
    # Z^T w: [k] -> [p]
    pull: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Solution:
    """The x of a least-squares problem [p], the iterations that it took, and whether it met the tolerance."""

    x: Tensor
    iterations: int
    has_converged: bool


@dataclass(frozen=True)
class Step:
    """The parameters after a step [p], their loss, and the length along the direction: 0 if none lowers the loss."""

    theta: Tensor
    loss: float
    length: float


def direction(
    z_kp: Tensor, gradient_k: Tensor, root: Root, *, rcond: float | None = None, damping: float = 0.0
) -> Tensor:
    """Returns the natural gradient direction [p] for an explicit Jacobian: a QR of Y, and an SVD of its small factor.

    gradient_k: df/drho. rcond: singular values of Y below rcond times the largest count as 0, and of all minimisers the
    shortest is returned; by default max(e, p) times the dtype's rounding. damping: adds damping * |eta|^2.
    Raises: ConfigError for shapes that don't fit; NonFiniteError.

    >>> from ngd_dist.exact.metrics import L2, Grid
    >>> root = L2(Grid((3,), (1.0,))).at(torch.ones(3))
    >>> direction(torch.tensor([[2.0], [0.0], [0.0]]), torch.tensor([1.0, 5.0, 0.0]), root)
    tensor([-0.5000])
    """
    _check_damping(damping)
    if z_kp.ndim != 2 or gradient_k.shape != z_kp.shape[:1]:
        raise ConfigError(
            f"the Jacobian is [k, p] and the gradient [k], got {tuple(z_kp.shape)} and {tuple(gradient_k.shape)}"
        )
    _check_finite(z_kp, "the Jacobian")
    _check_finite(gradient_k, "the gradient by the state")
    y_ep, b_e = root.apply(z_kp), root.dual(gradient_k)
    q, r = torch.linalg.qr(y_ep)
    u, singular, vt = torch.linalg.svd(r, full_matrices=False)
    if rcond is None:
        rcond = max(y_ep.shape) * torch.finfo(y_ep.dtype).eps
    kept = singular > rcond * singular[0]
    divisors = torch.where(kept, singular, 1)
    # Not singular / (singular^2 + damping): the square of a value below 1e-162 is 0 in float64.
    filters = torch.where(kept, 1 / (divisors + damping / divisors), 0)
    eta: Tensor = -(vt.T @ (filters * (u.T @ (q.T @ b_e))))
    return eta


def iterative_direction(
    jacobian: Jacobian,
    gradient_k: Tensor,
    root: Root,
    *,
    damping: float = 0.0,
    max_iterations: int = 100,
    tolerance: float = 1e-8,
) -> Solution:
    """Returns the natural gradient direction for a Jacobian of products, by LSQR: two products per iteration.

    Stopped early, it is still a descent direction: each iterate minimises over a growing space that begins with the
    gradient by the parameters. See `lsqr` for the settings. Raises: ConfigError, NonFiniteError.

    >>> from ngd_dist.exact.metrics import L2, Grid
    >>> root = L2(Grid((3,), (1.0,))).at(torch.ones(3))
    >>> z = torch.tensor([[2.0], [0.0], [0.0]])
    >>> products = Jacobian(push=lambda eta: z @ eta, pull=lambda w: z.T @ w)
    >>> iterative_direction(products, torch.tensor([1.0, 5.0, 0.0]), root).x
    tensor([-0.5000])
    """
    _check_finite(gradient_k, "the gradient by the state")
    return lsqr(
        lambda eta: root.apply(jacobian.push(eta)),
        lambda w: jacobian.pull(root.adjoint(w)),
        -root.dual(gradient_k),
        damping=damping,
        max_iterations=max_iterations,
        tolerance=tolerance,
    )


def implicit_jacobian(
    constraint: Callable[[Tensor, Tensor], Tensor],
    rho: Tensor,
    theta: Tensor,
    *,
    solve: Callable[[Tensor], Tensor],
    adjoint_solve: Callable[[Tensor], Tensor],
) -> Jacobian:
    """Returns Z = -(dh/drho)^-1 dh/dtheta of the state that solves a PDE h(rho, theta) = 0.

    constraint: h [k]; it is differentiated by theta alone, at rho [k] and theta [p]. solve: x with (dh/drho) x = its
    argument [k]; adjoint_solve: the same with the transpose. A product costs one solve.

    >>> a, theta = torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([3.0])
    >>> def h(rho, theta):  # a rho = [theta, 0]
    ...     return a @ rho - torch.cat([theta, torch.zeros(1)])
    >>> solve, adjoint_solve = (lambda v: torch.linalg.solve(a, v)), (lambda w: torch.linalg.solve(a.T, w))
    >>> z = implicit_jacobian(h, torch.tensor([1.5, -1.5]), theta, solve=solve, adjoint_solve=adjoint_solve)
    >>> z.push(torch.ones(1))
    tensor([ 0.5000, -0.5000])
    """
    rho, theta = rho.detach(), theta.detach()

    def push(eta: Tensor) -> Tensor:
        return -solve(_pushed(lambda t: constraint(rho, t), theta, eta))

    residual, pull_theta = torch.func.vjp(lambda t: constraint(rho, t), theta)[:2]
    if residual.shape != rho.shape:
        raise ConfigError(
            f"the constraint has one equation per cell of the state, {tuple(rho.shape)}, got {tuple(residual.shape)}"
        )
    return Jacobian(push=push, pull=lambda w: -pull_theta(adjoint_solve(w))[0])


def lsqr(
    push: Callable[[Tensor], Tensor],
    pull: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    damping: float = 0.0,
    max_iterations: int = 100,
    tolerance: float = 1e-8,
) -> Solution:
    """Returns the x [p] of least |A x - b|^2 + damping |x|^2, and of least norm, from the products A x and A^T w.

    tolerance: stops when |A^T r| is below tolerance * |A| |r|, or |r| below tolerance * |b|, r the residual of the
    damped problem. Reads three numbers from the device per iteration. Raises: ConfigError, NonFiniteError.
    Source: [PS82].

    >>> a = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> lsqr(lambda x: a @ x, lambda w: a.T @ w, torch.tensor([3.0, 2.0, 1.0])).x
    tensor([1.0000, 2.0000])
    """
    _check_damping(damping)
    if max_iterations < 1 or not 0 < tolerance < 1:
        raise ConfigError(
            f"LSQR needs max_iterations >= 1 and a tolerance in (0, 1), got {max_iterations} and {tolerance}"
        )
    beta, u = _normalised(b)
    alpha, v = _normalised(pull(u))
    x, w = torch.zeros_like(v), v.clone()
    norm_b, phi_bar, rho_bar = beta, beta, alpha
    squares, squared_rest = 0.0, 0.0  # |A|^2 in the Frobenius norm; what damping adds to |r|^2
    if alpha * beta == 0:
        return Solution(x, 0, True)
    for iteration in range(1, max_iterations + 1):
        beta, u = _normalised(push(v) - alpha * u)
        squares += alpha**2 + beta**2 + damping
        alpha, v = _normalised(pull(u) - beta * v)
        # A rotation takes the damping's row into the diagonal, a second one the subdiagonal.
        damped = math.hypot(rho_bar, math.sqrt(damping))
        squared_rest += (math.sqrt(damping) / damped * phi_bar) ** 2
        phi_bar *= rho_bar / damped
        rho = math.hypot(damped, beta)
        cosine, sine = damped / rho, beta / rho
        theta, rho_bar = sine * alpha, -cosine * alpha
        phi, phi_bar = cosine * phi_bar, sine * phi_bar
        x += phi / rho * w
        w = v - theta / rho * w
        residual = math.sqrt(phi_bar**2 + squared_rest)
        normal = alpha * abs(cosine * phi_bar)  # |A^T r|
        if normal <= tolerance * math.sqrt(squares) * residual or residual <= tolerance * norm_b:
            return Solution(x, iteration, True)
    return Solution(x, max_iterations, False)


class StateSpaceNGD:
    """Natural gradient descent of loss(state(theta)) in a metric on states, with a line search.

    state: theta [p] -> rho [k]; loss: rho [k] -> a number. Both are differentiated by torch. By default the Jacobian is
    formed by torch.func, `chunk_size` columns or rows at a time; if `jacobian` returns products at (theta, rho), such
    as `implicit_jacobian`, LSQR takes `max_iterations` of them per step. A step tries the lengths lr, lr / 2, ...,
    lr / 2^halvings and takes that of the least loss: halvings + 1 states per step.

    >>> from ngd_dist.exact.metrics import Grid, Wasserstein
    >>> grid = Grid((200,), (0.1,))
    >>> x = torch.arange(200, dtype=torch.float64) * 0.1 - 10
    >>> def gaussian(theta):
    ...     return torch.exp(-0.5 * (x - theta[0]) ** 2) / (2 * torch.pi) ** 0.5
    >>> optimizer = StateSpaceNGD(Wasserstein(grid), gaussian, lambda rho: 0.5 * ((rho * x).sum() * 0.1 - 1.5) ** 2)
    >>> optimizer.step(torch.zeros(1, dtype=torch.float64)).theta
    tensor([1.5000], dtype=torch.float64)
    """

    def __init__(
        self,
        metric: Metric,
        state: Callable[[Tensor], Tensor],
        loss: Callable[[Tensor], Tensor],
        *,
        jacobian: Callable[[Tensor, Tensor], Jacobian] | None = None,
        lr: float = 1.0,
        halvings: int = 10,
        rcond: float | None = None,
        damping: float = 0.0,
        chunk_size: int | None = None,
        max_iterations: int = 100,
        tolerance: float = 1e-8,
    ) -> None:
        if lr <= 0 or halvings < 0:
            raise ConfigError(f"the line search needs lr > 0 and halvings >= 0, got {lr} and {halvings}")
        if jacobian is not None and rcond is not None:
            raise ConfigError("rcond truncates an explicit Jacobian, and jacobian= gives products; set damping instead")
        _check_damping(damping)
        self.metric, self.state, self.loss, self.jacobian = metric, state, loss, jacobian
        self.lr, self.halvings, self.rcond, self.damping = lr, halvings, rcond, damping
        self.chunk_size, self.max_iterations, self.tolerance = chunk_size, max_iterations, tolerance

    def direction(self, theta: Tensor) -> Tensor:
        """Returns the natural gradient direction at theta [p], which a step would follow. Raises: as `step`."""
        return self._direction(theta.detach(), self._state(theta.detach()))

    def step(self, theta: Tensor) -> Step:
        """Returns the parameters after one step from theta [p]; theta itself is left as it is.

        A trial whose loss is NaN or infinite is passed over. Raises: ConfigError if a state doesn't fit the metric;
        NonFiniteError for a state, a loss, a Jacobian or a gradient at theta that is not finite.
        """
        theta = theta.detach()
        rho = self._state(theta)
        first = float(self.loss(rho))
        if not math.isfinite(first):
            raise NonFiniteError(f"the loss at the start of the step is {first}")
        eta = self._direction(theta, rho)

        @torch.no_grad()
        def losses(lengths: Tensor) -> Tensor:  # one state at a time: each may be a solve of a PDE
            trials = (
                float(self.loss(self.state(theta + length * eta))) if length else first for length in lengths.tolist()
            )
            return lengths.new_tensor([*trials])

        # All lengths: where a loss has several valleys, the first good length may lead to a worse one than the best.
        grid = GridSearch(count=self.halvings + 1, group=self.halvings + 1)
        length, loss = best_length(losses, self.lr, grid, device=theta.device)
        return Step(theta + length * eta, loss, length)

    def _state(self, theta: Tensor) -> Tensor:
        if theta.ndim != 1:
            raise ConfigError(f"theta is one vector of parameters, got the shape {tuple(theta.shape)}; flatten it")
        with torch.no_grad():
            return self.state(theta)

    def _direction(self, theta: Tensor, rho: Tensor) -> Tensor:
        root = self.metric.at(rho)
        gradient: Tensor = torch.func.grad(self.loss)(rho)
        if self.jacobian is not None:
            products = self.jacobian(theta, rho)
            return iterative_direction(
                products,
                gradient,
                root,
                damping=self.damping,
                max_iterations=self.max_iterations,
                tolerance=self.tolerance,
            ).x
        z_kp = _jacobian(self.state, theta, len(rho), self.chunk_size)
        return direction(z_kp, gradient, root, rcond=self.rcond, damping=self.damping)


def _jacobian(state: Callable[[Tensor], Tensor], theta: Tensor, cells: int, chunk_size: int | None) -> Tensor:
    """Returns Z [k, p], by forward mode, a column per pass, or by reverse mode, a row per pass: whichever has fewer."""
    if cells < len(theta):
        rows: Tensor = torch.func.jacrev(state, chunk_size=chunk_size)(theta)
        return rows
    units = torch.eye(len(theta), dtype=theta.dtype, device=theta.device)
    columns: Tensor = torch.func.vmap(lambda eta: _pushed(state, theta, eta), out_dims=1, chunk_size=chunk_size)(units)
    return columns


def _pushed(function: Callable[[Tensor], Tensor], theta: Tensor, eta: Tensor) -> Tensor:
    with warnings.catch_warnings():  # torch's own first use of forward mode warns that it scripts its formulas
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        change: Tensor = torch.func.jvp(function, (theta,), (eta,))[1]
    return change


def _normalised(vector: Tensor) -> tuple[float, Tensor]:
    norm = float(vector.norm())
    if not math.isfinite(norm):
        raise NonFiniteError(f"a product with the Jacobian has the norm {norm}: a linear solve of the model failed")
    return norm, vector / norm if norm else vector


def _check_damping(damping: float) -> None:
    if not (math.isfinite(damping) and damping >= 0):
        raise ConfigError(f"damping must be >= 0, got {damping}; the default is 0")


def _check_finite(tensor: Tensor, name: str) -> None:
    if not bool(tensor.isfinite().all()):
        raise NonFiniteError(f"{name} has {int((~tensor.isfinite()).sum())} entries that are NaN or infinite")
