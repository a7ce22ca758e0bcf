"""Multinomial logistic regression on categories, by natural gradients of the joint family of features and class.

N: observations, R: features, M: categories of all features together, S: classes, D: free parameters. Feature i has
sizes[i] categories, and its rows of a table [M, S] follow those of feature i - 1. The joint family is

    p(x, y) = exp(alpha_y + sum_i beta_{i, x_i, y} - psi),

and only its conditional p(y | x) is trained. The family is dually flat: its inverse Fisher matrix is the derivative of
the natural parameters (alpha, beta) by the expectation parameters (p_y, p(x_i = v, y)), and so needs no inversion.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ngd_dist.config.dually_flat import StepSize
from ngd_dist.errors import CheckpointError, ConfigError

__all__ = ["CSNGD", "DuallyFlatRegression", "Duals", "clipped_inverse", "joint_fisher"]

TABLES = ("alpha_S", "beta_MS", "counts_S", "counts_MS")


@dataclass(frozen=True, slots=True)
class Duals:
    """Expectation parameters of the joint family: p_S [S] is p(y), and p_MS [M, S] is p(x_i = v, y)."""

    p_S: Tensor  # noqa: N815
    p_MS: Tensor  # noqa: N815


class DuallyFlatRegression:
    """Multinomial logistic regression p(y | x) on categorical features, trained by natural gradient steps.

    sizes: categories of each feature. classes: S. duals: "running" is DSNGD, whose Fisher matrix is that of the counts
    of the observations of earlier steps: the counts begin above 0, so that no probability is 0. "own" is SNGD, whose
    Fisher matrix is that of the current parameters; nothing bounds its steps. prior_count: weight of the uniform
    distribution in the counts, in observations; None is sum(sizes) - R + 1.

    A step on N observations costs O(N R S) with running duals, whatever the sizes are: it reads and writes the R + 1
    rows [S] of each observation's categories and adds 1 to R + 1 counts. Own duals cost O(M S) more. The tables have
    one row per category, though the last of each feature is determined by the others: in those coordinates an observed
    last category moves no other row. `theta` returns the D free parameters.

    Raises: ConfigError. Source: arXiv 2001.06744 and its authors' code; O(M S) own duals, where their code sums over
    all x, and steps on the observed rows alone are ours.

    >>> model = DuallyFlatRegression([3, 2], classes=2)
    >>> x, y = torch.tensor([[0, 1], [2, 0]]), torch.tensor([1, 0])
    >>> first, *_, last = [float(model.step(x, y)) for _ in range(5)]
    >>> last < first
    True
    >>> model.logits(x).argmax(1)
    tensor([1, 0])
    """

    def __init__(
        self,
        sizes: Sequence[int],
        classes: int,
        *,
        duals: Literal["running", "own"] = "running",
        step_size: StepSize | None = None,
        prior_count: float | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        if not sizes or min(sizes) < 1 or classes < 2:
            raise ConfigError(
                f"the model needs features of at least 1 category and at least 2 classes, got sizes={list(sizes)} and "
                f"classes={classes}"
            )
        if duals not in ("running", "own"):
            raise ConfigError(f"duals must be 'running' (DSNGD) or 'own' (SNGD), got {duals!r}")
        self.sizes, self.classes, self.duals = tuple(sizes), classes, duals
        self.step_size = step_size or StepSize()
        total = sum(sizes) - len(sizes) + 1 if prior_count is None else prior_count
        if not total > 0:
            raise ConfigError(f"prior_count must be > 0, or a probability is 0; got {total}; the default is None")
        self.steps = 0
        self.observations = float(total)  # those of the prior among them
        self.alpha_S = torch.zeros(classes, dtype=dtype, device=device)
        self.beta_MS = torch.zeros(sum(sizes), classes, dtype=dtype, device=device)
        self.counts_S = torch.full_like(self.alpha_S, total / classes)
        sizes_R = torch.tensor(self.sizes, device=device)
        self._sizes_R, self._offsets_R = sizes_R, sizes_R.cumsum(0) - sizes_R
        sizes_M = sizes_R.repeat_interleave(sizes_R).to(dtype)
        self.counts_MS = (total / (classes * sizes_M))[:, None].repeat(1, classes)

    def logits(self, x_NR: Tensor) -> Tensor:
        """Returns the logits [N, S]. x_NR [N, R]: int64 categories from 0. Raises: ValueError."""
        return self._logits(self._rows(x_NR))

    def step(self, x_NR: Tensor, y_N: Tensor) -> Tensor:
        """Takes one step, counts the observations, and returns their mean loss before it, a scalar on the device.

        x_NR [N, R] and y_N [N]: int64 categories and classes from 0. The step uses the counts of earlier steps alone:
        so its Fisher matrix is independent of its gradient. Raises: ValueError.
        """
        rows_NR = self._rows(x_NR)
        self._check_classes(y_N, len(rows_NR))
        log_p_NS = self._logits(rows_NR).log_softmax(1)
        q_NS = log_p_NS.exp()
        q_NS[torch.arange(len(y_N), device=y_N.device), y_N] -= 1
        loss = F.nll_loss(log_p_NS, y_N)
        if self.duals == "own":
            self._descend(rows_NR, q_NS, self.own_duals(), total=1)
        else:  # the counts as they are: to divide them all would cost O(M S)
            self._descend(rows_NR, q_NS, Duals(self.counts_S, self.counts_MS), total=self.observations)
        self._count(rows_NR, y_N)
        self.steps += 1
        return loss

    def gradient(self, x_NR: Tensor, y_N: Tensor) -> Tensor:
        """Returns the gradient [D] of the mean loss by `theta`. Costs O(N R S + M S). Raises: ValueError."""
        q_S, q_MS = self._gradient_tables(x_NR, y_N)
        free_M = ~self._is_last()
        return torch.cat([q_S[:-1], q_MS[free_M].flatten()])

    def natural_gradient(self, x_NR: Tensor, y_N: Tensor, duals: Duals) -> Tensor:
        """Returns F^-1 times `gradient`, [D], for the Fisher matrix F of the joint family at duals.

        `step` moves `theta` along it without forming it. Costs O(N R S + M S). Raises: ValueError.
        """
        q_S, q_MS = self._gradient_tables(x_NR, y_N)
        return self._free(q_S * (1 - len(self.sizes)) / duals.p_S, q_MS / duals.p_MS)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns what a step changes: parameters, counts, steps and observations, each as a tensor of its own."""
        numbers = {"steps": self.steps, "observations": self.observations}
        tables = {name: getattr(self, name).clone() for name in TABLES}
        return tables | {name: torch.tensor(number, dtype=torch.float64) for name, number in numbers.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over a state. Raises: CheckpointError, with nothing changed, if it is of a model of other sizes."""
        own = {name: list(value.shape) for name, value in self.state_dict().items()}
        given = {name: list(value.shape) for name, value in state.items()}
        if given != own:
            raise CheckpointError(f"the state is of a model with other features or classes: {given}, not {own}")
        for name in TABLES:
            getattr(self, name).copy_(state[name])
        self.steps, self.observations = int(state["steps"]), float(state["observations"])

    def theta(self) -> Tensor:
        """Returns the natural parameters [D]: alpha [S - 1], then beta of all categories but each feature's last."""
        return self._free(self.alpha_S, self.beta_MS)

    def running_duals(self) -> Duals:
        """Returns the duals of the counts, which share no memory with them. Costs O(M S)."""
        return Duals(self.counts_S / self.observations, self.counts_MS / self.observations)

    def own_duals(self) -> Duals:
        """Returns the duals of the current parameters. Costs O(M S).

        The features are independent given the class, so that the sum over all x is a product of R sums.
        """
        log_z = [table.logsumexp(0) for table in self.beta_MS.split(self.sizes)]
        p_S = (self.alpha_S + torch.stack(log_z).sum(0)).softmax(0)
        return Duals(p_S, torch.cat([table.softmax(0) for table in self.beta_MS.split(self.sizes)]) * p_S)

    def _logits(self, rows_NR: Tensor) -> Tensor:
        # One kernel that sums the rows: no [N, R, S].
        return self.alpha_S + F.embedding_bag(rows_NR, self.beta_MS, mode="sum")

    def _descend(self, rows_NR: Tensor, q_NS: Tensor, duals: Duals, *, total: float) -> None:
        """Moves the observed rows by F^-1 times the gradient at duals / total; reads no other rows."""
        rate = self.step_size.at(self.steps) * total / len(q_NS)
        self.alpha_S -= rate * (1 - len(self.sizes)) * q_NS.sum(0) / duals.p_S
        for rows_N in rows_NR.unbind(1):
            self.beta_MS.index_add_(0, rows_N, q_NS / duals.p_MS[rows_N], alpha=-rate)

    def _count(self, rows_NR: Tensor, y_N: Tensor) -> None:
        ones = torch.ones_like(rows_NR, dtype=self.counts_S.dtype)
        self.counts_S.index_add_(0, y_N, ones[:, 0])
        self.counts_MS.view(-1).index_add_(0, (rows_NR * self.classes + y_N[:, None]).flatten(), ones.flatten())
        self.observations += len(y_N)

    def _gradient_tables(self, x_NR: Tensor, y_N: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the derivatives of the mean loss by alpha [S] and by every row of beta [M, S]."""
        rows_NR = self._rows(x_NR)
        self._check_classes(y_N, len(rows_NR))
        q_NS = (self._logits(rows_NR).softmax(1) - F.one_hot(y_N, self.classes)) / len(y_N)
        q_MS = torch.zeros_like(self.beta_MS)
        for rows_N in rows_NR.unbind(1):
            q_MS.index_add_(0, rows_N, q_NS)
        return q_NS.sum(0), q_MS

    def _free(self, alpha_S: Tensor, beta_MS: Tensor) -> Tensor:
        """Returns the free parameters [D] of tables: each feature's last row goes to alpha, whose last entry goes."""
        is_last_M = self._is_last()
        last_RS = beta_MS[is_last_M]
        alpha_S = alpha_S + last_RS.sum(0)
        beta_MS = beta_MS - last_RS.repeat_interleave(self._sizes_R, 0)
        return torch.cat([alpha_S[:-1] - alpha_S[-1], beta_MS[~is_last_M].flatten()])

    def _is_last(self) -> Tensor:
        is_last_M = torch.zeros(len(self.beta_MS), dtype=torch.bool, device=self.beta_MS.device)
        is_last_M[self._offsets_R + self._sizes_R - 1] = True
        return is_last_M

    def _rows(self, x_NR: Tensor) -> Tensor:
        """Returns the rows [N, R] of the tables. Two host syncs on a GPU: a category out of range corrupts others."""
        if x_NR.ndim != 2 or x_NR.shape[1] != len(self.sizes) or not len(x_NR):
            raise ValueError(f"x must be [N > 0, {len(self.sizes)}], got {list(x_NR.shape)}")
        if x_NR.dtype != torch.int64:
            raise ValueError(f"x must hold categories as int64, got {x_NR.dtype}")
        if bool(((x_NR < 0) | (x_NR >= self._sizes_R)).any()):
            row, feature = ((x_NR < 0) | (x_NR >= self._sizes_R)).nonzero()[0].tolist()
            raise ValueError(
                f"category {int(x_NR[row, feature])} of feature {feature} is unknown: it has {self.sizes[feature]}"
            )
        return x_NR + self._offsets_R

    def _check_classes(self, y_N: Tensor, num_observations: int) -> None:
        if y_N.shape != (num_observations,) or y_N.dtype != torch.int64:
            raise ValueError(f"y must be int64 [{num_observations}], got {y_N.dtype} {list(y_N.shape)}")
        if bool(((y_N < 0) | (y_N >= self.classes)).any()):
            raise ValueError(f"class {int(y_N.max())} or {int(y_N.min())} is not in 0..{self.classes - 1}")


class CSNGD:
    """Convergent stochastic natural gradient: theta <- theta - a / (1 + b t) A g.

    A is the inverse of a Fisher matrix that the caller estimates independently of g, with eigenvalues clipped into
    [smallest, largest]. theta [D] is changed in place. step_size needs b > 0 for the steps to converge. A step costs
    O(D^3): `DuallyFlatRegression` with running duals does without for its family. Raises: ConfigError.
    Source: CSNGD of Sanchez-Lopez and Cerquides as the abstract of arXiv 2001.06744 describes it; clipping eigenvalues
    as the way to bound A, and the default bounds, are ours.

    >>> theta = torch.ones(2, dtype=torch.float64)
    >>> method = CSNGD(theta, smallest=0.1, largest=10.0, step_size=StepSize(a=0.5, b=0.1))
    >>> method.step(theta.clone(), torch.eye(2, dtype=torch.float64))
    >>> theta
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    def __init__(
        self, theta: Tensor, *, smallest: float = 1e-3, largest: float = 1e3, step_size: StepSize | None = None
    ) -> None:
        if not 0 < smallest <= largest:
            raise ConfigError(f"the bounds must be 0 < smallest <= largest, got {smallest} and {largest}")
        self.theta, self.smallest, self.largest = theta, smallest, largest
        self.step_size = step_size or StepSize()
        self.steps = 0

    def step(self, gradient: Tensor, fisher: Tensor) -> None:
        """Takes one step. gradient [D]; fisher [D, D], of an estimate that is independent of gradient."""
        direction = clipped_inverse(fisher, self.smallest, self.largest) @ gradient
        self.theta -= self.step_size.at(self.steps) * direction
        self.steps += 1


def clipped_inverse(fisher: Tensor, smallest: float, largest: float) -> Tensor:
    """Returns the inverse of a symmetric matrix [D, D] with its eigenvalues clipped into [smallest, largest].

    An eigenvalue of fisher that is 0 or negative, as by rounding, counts as one whose inverse is largest.

    >>> clipped_inverse(torch.diag(torch.tensor([0.0, 2.0, 100.0])), 0.1, 10.0).diagonal()
    tensor([10.0000,  0.5000,  0.1000])
    """
    values, vectors = torch.linalg.eigh(fisher)
    inverse: Tensor = (vectors / values.clamp(1 / largest, 1 / smallest)) @ vectors.T
    return inverse


def joint_fisher(sizes: Sequence[int], duals: Duals) -> Tensor:
    """Returns the Fisher matrix [D, D] of the joint family at duals, in the order of `DuallyFlatRegression.theta`.

    It is the covariance of the statistics [y = k] and [x_i = v, y = k]. Features are independent given the class.
    Costs O(D^2) memory.

    >>> model = DuallyFlatRegression([3, 2], classes=2)
    >>> joint_fisher(model.sizes, model.own_duals()).shape
    torch.Size([7, 7])
    """
    classes = len(duals.p_S)
    blocks = [block[:-1] for block in duals.p_MS.split(list(sizes))]
    feature_V = torch.cat([torch.full((len(block),), i, device=block.device) for i, block in enumerate(blocks)])
    p_VS = torch.cat(blocks)
    joint_VVS = p_VS[:, None] * p_VS[None] / duals.p_S
    # Two categories of one feature exclude each other.
    same_VV = feature_V[:, None] == feature_V
    joint_VVS = torch.where(same_VV[..., None], torch.diag_embed(p_VS.T).permute(1, 2, 0), joint_VVS)
    # [S, 1 + V, 1 + V]: the second moments of a class's statistics, with [y = k] itself the first.
    size = 1 + len(p_VS)
    moments = p_VS.new_empty(classes, size, size)
    moments[:, 0, 0] = duals.p_S
    moments[:, 0, 1:] = moments[:, 1:, 0] = p_VS.T
    moments[:, 1:, 1:] = joint_VVS.permute(2, 0, 1)
    # Statistics of different classes exclude each other too; the order becomes that of theta, [1 + V, S].
    second = torch.diag_embed(moments.permute(1, 2, 0)).permute(0, 2, 1, 3).reshape(size * classes, size * classes)
    mean = torch.cat([duals.p_S, p_VS.flatten()])
    fisher = second - mean[:, None] * mean
    free = torch.arange(size * classes, device=mean.device) != classes - 1
    return fisher[free][:, free]
