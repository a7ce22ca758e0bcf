"""Natural gradient steps of Gaussian variational distributions, q(u) = N(m, L L^T).

Salimbeni, Eleftheriadis, Hensman (2018, arXiv:1803.09151). For an exponential family the natural gradient in the
natural parameters theta is the plain one in the expectation parameters eta, so that no Fisher matrix is formed:
theta1 = S^-1 m, theta2 = -S^-1 / 2; eta1 = m, eta2 = S + m m^T.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ngd_dist.distributed.comm import Communicator
from ngd_dist.errors import ConfigError, NonFiniteError

__all__ = ["Parametrisation", "VariationalNGD", "gpytorch_pairs"]

Parametrisation = Literal["natural", "expectation", "mean_root"]
MAX_HALVINGS = 40  # gamma 1 is then below 1e-12: a step that fails there has a gradient of no use


class Pair(NamedTuple):
    """A vector and a matrix: (theta1, theta2), (eta1, eta2) or (m, L), [*, M] and [*, M, M]."""

    vector: Tensor
    matrix: Tensor


class VariationalNGD(torch.optim.Optimizer):
    """Steps the means and roots of Gaussian distributions along the natural gradient; take Adam for all else.

    pairs: (mean [*, M], root [*, M, M]) parameters of one dtype, float64 advised; the distribution is N(m, L L^T) with
    L the root's lower triangle. gamma: the length of a step, (0, 1]; 1 reaches the exact posterior of a Gaussian
    likelihood in one step. The param groups call it "lr", so that torch's schedules can change it.
    warmup: steps over which gamma rises to its value, evenly in its logarithm, from a thousandth of it; the paper's
    schedule for other likelihoods is gamma 0.1 and warmup 5.
    parametrisation: the coordinates in which the step is straight. They agree to first order in gamma; with "natural"
    gamma 1 is exact for conjugate models, and it is the default as in GPflow.
    num_data: the number of samples of which the loss is a mean, as in GPyTorch, whose own NGD has the argument too; 1
    if it is a sum, as in GPflow. With 1 in place of N, steps are N times too short.
    process_group: ranks over which gradients are averaged before the step; None: all ranks, if there are any. All of
    them build it, and start from the pairs of rank 0.

    A step that would leave the covariance not positive definite is halved until it does not. Cost: a few Cholesky
    factorisations and triangular solves of [M, M] for each pair.

    Raises: ConfigError for pairs that don't fit or a gamma out of bounds.

    >>> mean, root = nn.Parameter(torch.zeros(3).double()), nn.Parameter(torch.eye(3).double())
    >>> optimizer = VariationalNGD([(mean, root)], gamma=1.0)
    >>> y = torch.tensor([1.0, 2.0, 3.0]).double()  # of noise variance 1, and a prior N(0, I)
    >>> covariance = root @ root.T
    >>> fit = 0.5 * ((y - mean).square().sum() + covariance.trace())
    >>> prior = 0.5 * (covariance.trace() + mean.square().sum()) - root.diagonal().log().sum()
    >>> (fit + prior).backward()
    >>> optimizer.step()
    >>> [round(value, 6) for value in mean.tolist()]
    [0.5, 1.0, 1.5]
    """

    def __init__(
        self,
        pairs: Iterable[tuple[nn.Parameter, nn.Parameter]],
        gamma: float = 0.1,
        *,
        num_data: int = 1,
        warmup: int = 0,
        parametrisation: Parametrisation = "natural",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        pairs = [(mean, root) for mean, root in pairs]
        _check(pairs, gamma, num_data, warmup, parametrisation)
        groups = [{"params": [mean, root]} for mean, root in pairs]
        self._num_data = num_data
        super().__init__(groups, {"lr": gamma, "warmup": warmup, "parametrisation": parametrisation, "steps": 0})
        self._comm = Communicator(process_group)
        for number, value in enumerate(value for pair in pairs for value in pair):
            self._comm.broadcast(f"variational: start {number}", value.detach())

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Collective. Takes one step from the gradients of a loss to be minimised, such as the negative ELBO.

        A pair without gradients stays as it is. Raises: NonFiniteError, with nothing changed, if a gradient is not
        finite; ConfigError if no length of step keeps a covariance positive definite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [self._gradient(index, group) for index, group in enumerate(self.param_groups)]
        for group, gradient in zip(self.param_groups, gradients, strict=True):
            if gradient is not None:
                group["steps"] += 1
                self._move(group, gradient)
        return loss

    def _gradient(self, index: int, group: dict[str, Any]) -> Pair | None:
        mean, root = group["params"]
        has_gradient = mean.grad is not None or root.grad is not None
        if self._comm.world_size == 1 and not has_gradient:
            return None
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in (mean, root)]
        if self._comm.world_size > 1:
            sizes = [mean.numel(), root.numel(), 1]
            joined = torch.cat([*(part.flatten() for part in parts), mean.new_full((1,), float(has_gradient))])
            self._comm.all_reduce("variational: gradients", joined, kind="gradients")
            *sums, ranks = joined.split(sizes)
            if float(ranks) == 0:
                return None
            parts = [part.view(p.shape) / self._comm.world_size for part, p in zip(sums, (mean, root), strict=True)]
        if not all(bool(part.isfinite().all()) for part in parts):
            raise NonFiniteError(
                f"the gradient of pair {index} is NaN or infinite, and nothing was changed; lower gamma, or the "
                "learning rate of the hyper-parameters"
            )
        return Pair(self._num_data * parts[0], self._num_data * parts[1].tril())

    def _move(self, group: dict[str, Any], gradient: Pair) -> None:
        mean, root = group["params"]
        now = Pair(mean.detach(), root.detach().tril())
        in_expectation = _gradient_in_expectation(now, gradient)
        take = STEPS[group["parametrisation"]]
        gamma = group["lr"] * _rising(group["steps"], group["warmup"])
        for _ in range(MAX_HALVINGS):
            moved = take(now, in_expectation, gamma)
            if moved is not None:
                mean.copy_(moved.vector)
                root.copy_(moved.matrix)
                return
            gamma /= 2
        raise ConfigError(
            f"no step of a length down to {gamma:.1e} keeps the covariance positive definite: keep the parameters in "
            "float64, or add jitter to the prior's covariance"
        )


def gpytorch_pairs(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Returns the mean and root of each Cholesky variational distribution of a GPyTorch model.

    `VariationalNGD(gpytorch_pairs(model), gamma=0.1, num_data=len(x))` is the line beside Adam on
    `model.hyperparameters()`; see examples/gaussian_process.py.
    Raises: ConfigError if there is none.
    """
    names = ("variational_mean", "chol_variational_covar")
    found = [[dict(module.named_parameters(recurse=False)).get(name) for name in names] for module in model.modules()]
    pairs = [(mean, root) for mean, root in found if mean is not None and root is not None]
    if not pairs:
        raise ConfigError(
            "the model has no CholeskyVariationalDistribution; give its variational strategy one, in place of a "
            "mean-field, delta or natural distribution"
        )
    return pairs


# --- steps in three parametrisations ----------------------------------------------------------------------------------


def _in_natural(at: Pair, gradient: Pair, gamma: float) -> Pair | None:
    """theta <- theta - gamma dL/d eta; theta1 = P m and theta2 = -P / 2, with P = S^-1."""
    precision = torch.cholesky_inverse(at.matrix)
    root, info = torch.linalg.cholesky_ex(_symmetric(precision + 2 * gamma * gradient.matrix))
    if bool((info != 0).any()):
        return None
    theta1 = _product(precision, at.vector) - gamma * gradient.vector
    covariance = torch.cholesky_inverse(root)
    return _with_root(_product(covariance, theta1), covariance)


def _in_expectation(at: Pair, gradient: Pair, gamma: float) -> Pair | None:
    """eta <- eta - gamma (d eta/d theta) dL/d eta.

    With d = dm of that, S + m m^T - gamma (dS + d m^T + m d^T) less the outer product of the new mean is
    S - gamma dS - gamma^2 d d^T: so written, a large mean cancels nothing.
    """
    d_mean, d_root = _change_of_mean_and_root(at, gradient)
    d_covariance = d_root @ at.matrix.mT
    moved = at.matrix @ at.matrix.mT - gamma * (d_covariance + d_covariance.mT) - gamma**2 * _outer(d_mean)
    return _with_root(at.vector - gamma * d_mean, moved)


def _in_mean_root(at: Pair, gradient: Pair, gamma: float) -> Pair | None:
    """(m, L) <- (m, L) - gamma (d(m, L)/d theta) dL/d eta."""
    moved = Pair(
        *(value - gamma * change for value, change in zip(at, _change_of_mean_and_root(at, gradient), strict=True))
    )
    is_valid = bool((moved.matrix.diagonal(dim1=-2, dim2=-1) > 0).all()) and bool(moved.matrix.isfinite().all())
    return moved if is_valid else None


STEPS: dict[Parametrisation, Callable[[Pair, Pair, float], Pair | None]] = {
    "natural": _in_natural,
    "expectation": _in_expectation,
    "mean_root": _in_mean_root,
}


def _gradient_in_expectation(at: Pair, gradient: Pair) -> Pair:
    """Returns dL/d eta from dL/d(m, L): dL/dS = L^-T Phi(L^T dL/dL) L^-1, symmetric; dL/d eta1 = dL/dm - 2 dL/dS m."""
    inner = _lower(at.matrix.mT @ gradient.matrix)
    inner = torch.linalg.solve_triangular(at.matrix.mT, inner, upper=True)
    by_covariance = _symmetric(torch.linalg.solve_triangular(at.matrix, inner, upper=False, left=False))
    return Pair(gradient.vector - 2 * _product(by_covariance, at.vector), by_covariance)


def _change_of_mean_and_root(at: Pair, gradient: Pair) -> Pair:
    """Returns d(m, L)/d theta times a gradient in eta.

    dS = -S d(S^-1) S = 2 S (d theta2) S; dm = S (d theta1) + dS S^-1 m = S (d theta1 + 2 (d theta2) m);
    dL = L Phi(L^-1 dS L^-T) = L Phi(2 L^T (d theta2) L).
    """
    along = gradient.vector + 2 * _product(gradient.matrix, at.vector)
    d_mean = _product(at.matrix, _product(at.matrix.mT, along))
    return Pair(d_mean, at.matrix @ _lower(2 * at.matrix.mT @ gradient.matrix @ at.matrix))


def _with_root(mean: Tensor, covariance: Tensor) -> Pair | None:
    root, info = torch.linalg.cholesky_ex(_symmetric(covariance))
    is_valid = not bool((info != 0).any()) and bool(mean.isfinite().all())
    return Pair(mean, root) if is_valid else None


def _lower(matrix: Tensor) -> Tensor:
    """Returns Phi of it: the lower triangle, with half of the diagonal."""
    return matrix.tril() - 0.5 * torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1))


def _product(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)


def _outer(vector: Tensor) -> Tensor:
    return vector.unsqueeze(-1) * vector.unsqueeze(-2)


def _rising(step: int, warmup: int) -> float:
    """Returns the factor on gamma at a step that counts from 1: log-linear from 1e-3 to 1 over `warmup` steps."""
    return 1.0 if step > warmup else math.exp(math.log(1e-3) * (1 - (step - 1) / warmup))


def _check(
    pairs: list[tuple[nn.Parameter, nn.Parameter]], gamma: float, num_data: int, warmup: int, parametrisation: str
) -> None:
    if not pairs:
        raise ConfigError("pairs is empty; give one (mean, root) for each distribution")
    for index, (mean, root) in enumerate(pairs):
        if mean.dim() < 1 or root.shape != (*mean.shape, mean.shape[-1]) or root.dtype != mean.dtype:
            raise ConfigError(
                f"pair {index} must be a mean [*, M] and a root [*, M, M] of one dtype, got {list(mean.shape)} "
                f"{mean.dtype} and {list(root.shape)} {root.dtype}"
            )
        if not bool((root.detach().diagonal(dim1=-2, dim2=-1) > 0).all()):
            raise ConfigError(f"the root of pair {index} must have a positive diagonal; begin with the identity")
    if not 0 < gamma <= 1:
        raise ConfigError(f"gamma must be above 0 and at most 1, got {gamma}")
    if num_data < 1:
        raise ConfigError(f"num_data must be at least 1, got {num_data}")
    if warmup < 0:
        raise ConfigError(f"warmup must be at least 0 steps, got {warmup}")
    if parametrisation not in get_args(Parametrisation):
        raise ConfigError(f"parametrisation must be one of {get_args(Parametrisation)}, got {parametrisation!r}")
