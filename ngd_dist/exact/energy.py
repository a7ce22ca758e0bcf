"""Energy natural gradient descent for physics-informed networks [Müller & Zeinhofer, arXiv 2302.13163].

The loss is a sum of mean squared residuals, sum_k weight_k mean_n |r_k(x_n)|², without a factor 1/2. Its energy Gram
matrix is JᵀJ, with J the Jacobian of the residuals, each times sqrt(weight_k / N_k). The direction is that of
Gauss-Newton, d = -(JᵀJ + damping I)⁻¹ Jᵀr, and lr = 1 is its full step: it solves a problem that is linear in the
weights at once. (The paper's direction is that of the gradient 2 Jᵀr, twice as long: its full step is at 1/2.)

A part may be an `Energy` in place of a residual, the mean of a density. With D²E its second variation the direction is
d = -(D²E / 2 + damping I)⁻¹ DE / 2: the halves make it that of a residual where the density is a square.

The damping follows the line search, as in Levenberg and Marquardt's method. Of six first weights of Poisson's equation
in the paper's setting, all then had an error below 2e-5 after 300 steps; without damping, as published, two never left
the first loss.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ngd_dist.config.exact import EnergyNGDConfig
from ngd_dist.distributed.comm import Communicator
from ngd_dist.errors import CheckpointError, ConfigError, NonFiniteError
from ngd_dist.exact.flat import FlatModel
from ngd_dist.exact.jacobian import Energy, Pointwise, Residual, curvature_rows, jacobian_rows, pointwise, square, sums
from ngd_dist.exact.least_squares import KernelForm, LeastSquares, WeightsForm
from ngd_dist.exact.line_search import best_length

__all__ = ["EnergyNGD"]

Points = Mapping[str, Tensor]

LONG, SHORT = 1 / 4, 1 / 32  # shares of lr; the damping follows lengths outside of this range
LEAST_DAMPING, MOST_DAMPING = 1e-14, 1e-2  # how far it goes from the first one: float64's rounding, a gradient step


class EnergyNGD(Optimizer):
    """The energy natural gradient of a network and the residuals of its equations, or energies.

    residuals: by the name of each part of the domain, (u, x) -> residual at one point x, [d]. u is the network at one
    point: a scalar if it has one output, else [O]; torch.func differentiates it. A residual is a scalar or a vector.
    A part may be an `Energy` instead: its density is minimised as it is, in place of the square of a residual.

    Every rank of the process group builds it, gives its own points to each step, and gets the step of all points. The
    weights are those of rank 0 at first. Raises: ConfigError.

    >>> model = nn.Linear(1, 1).double()
    >>> residuals = {"interior": lambda u, x: torch.func.grad(u)(x).sum() - 2, "boundary": lambda u, x: u(x) - 1}
    >>> optimizer = EnergyNGD(model, residuals, EnergyNGDConfig(damping=0.0))
    >>> points = {"interior": torch.rand(8, 1).double(), "boundary": torch.zeros(1, 1).double()}
    >>> optimizer.step(points) > 1e-3, optimizer.step(points) < 1e-20
    (True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        residuals: Mapping[str, Residual | Energy],
        config: EnergyNGDConfig | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.config = config or EnergyNGDConfig()
        self._flat = FlatModel(model)
        self._comm = Communicator(process_group)
        self._parts = dict(residuals)
        self._jets = {
            name: pointwise(self._flat, part.jet if isinstance(part, Energy) else part)
            for name, part in residuals.items()
        }
        if not residuals:
            raise ConfigError("no residuals: give at least one part, such as {'interior': lambda u, x: ...}")
        if unknown := sorted(set(self.config.part_weights) - set(residuals)):
            raise ConfigError(f"part_weights names {unknown}, but the residuals are {sorted(residuals)}")
        self._has_energies = any(isinstance(part, Energy) for part in residuals.values())
        if self._has_energies and self.config.form == "kernel":
            raise ConfigError("form='kernel' is for residuals alone, and a part is an Energy; take form='weights'")
        if self._comm.world_size > 1 and self._flat.device != self._comm.device:
            raise ConfigError(f"the weights are on {self._flat.device}, the group's tensors on {self._comm.device}")
        # What a step changes beside the weights is in the group, which torch saves and loads with the state.
        defaults = {"lr": self.config.lr, "steps": 0, "damping": self.config.damping, "length": 0.0}
        super().__init__(self._flat.parameters, defaults)
        weights = self._flat.weights()
        self._comm.broadcast("exact: weights", weights)
        self._flat.assign(weights)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises: ConfigError for any group but the one of the model's trainable parameters."""
        if self.param_groups:
            raise ConfigError("EnergyNGD solves for all trainable parameters at once: they are one group")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, points: Points) -> float:  # type: ignore[override]
        """Collective. Moves the weights by the step of these points. Returns the loss before it, over all ranks.

        points: [N, d] of each part, in the weights' dtype and on their device; a rank may have none of a part.
        Raises, on all ranks and with nothing changed: ConfigError for other points; NonFiniteError.
        """
        totals, config, group = self._checked(points), self.config, self.param_groups[0]
        weights = self._flat.weights()
        problem = self._problem(points, totals, weights)
        loss = problem.value
        if not math.isfinite(loss):
            raise NonFiniteError(f"the loss is {loss}: a residual is NaN or infinite; no weight was changed")
        start = config.momentum * self._last_direction() if config.momentum else None
        direction = problem.direction(damping=group["damping"], rcond=config.rcond, start=start)
        length = group["lr"]
        if config.line_search is not None:

            def losses(lengths: Tensor) -> Tensor:
                return self._losses(points, totals, (weights + torch.outer(lengths, direction)).to(weights.dtype))

            length, _ = best_length(losses, group["lr"], config.line_search, device=weights.device)
            group["damping"] = self._next_damping(group["damping"], length / group["lr"])
        self._flat.assign((weights + length * direction).to(weights.dtype))
        if config.momentum:
            for weight, part in zip(self._flat.parameters, self._flat.split(direction), strict=True):
                self.state[weight]["direction"] = part.to(weight.dtype)
        group.update(steps=group["steps"] + 1, length=length)
        return loss

    def loss(self, points: Points) -> float:
        """Collective. Returns the loss of the points of all ranks; changes nothing. Raises: ConfigError."""
        totals = self._checked(points)
        return float(self._losses(points, totals, self._flat.weights().unsqueeze(0)))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state. Raises: CheckpointError, with nothing changed, if it is of another model."""
        try:
            shapes = {index: state["direction"].shape for index, state in state_dict["state"].items()}
            (saved,) = state_dict["param_groups"]
            own = [weight.shape for weight in self._flat.parameters]
            fits = len(saved["params"]) == len(own) and all(own[index] == shape for index, shape in shapes.items())
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise CheckpointError(f"this is no state of EnergyNGD: {error!r}") from error
        if not fits:
            raise CheckpointError("the state is of a model with other trainable parameters")
        super().load_state_dict(state_dict)

    def _checked(self, points: Points) -> dict[str, int]:
        """Collective. Returns the number of points of each part over all ranks. Raises: ConfigError, on all ranks."""
        problem = self._refuses(points)
        # One entry for ranks that refuse, so that the others do too instead of waiting for them.
        counts = torch.zeros(len(self._parts) + 1, dtype=torch.float64, device=self._flat.device)
        counts[-1] = problem is not None
        if problem is None:
            counts[:-1] = torch.tensor([len(points[name]) for name in self._parts], dtype=torch.float64)
        self._comm.all_reduce("exact: points", counts)
        if problem is not None:
            raise ConfigError(problem)
        *totals, refusing = (int(count) for count in counts.tolist())
        if refusing:
            raise ConfigError(f"{refusing} other rank(s) refused their points; their errors say why")
        if empty := [name for name, total in zip(self._parts, totals, strict=True) if not total]:
            raise ConfigError(f"no rank has a point of {empty}; every part needs at least one")
        return dict(zip(self._parts, totals, strict=True))

    def _refuses(self, points: Points) -> str | None:
        if set(points) != set(self._parts):
            return f"points must be of the parts {sorted(self._parts)}, got {sorted(points)}"
        for name, some in points.items():
            if some.ndim != 2:
                return f"points of {name!r} must be of the shape [N, d], got {list(some.shape)}"
            if (some.dtype, some.device) != (self._flat.dtype, self._flat.device):
                return (
                    f"points of {name!r} are {some.dtype} on {some.device}, the weights {self._flat.dtype} on "
                    f"{self._flat.device}; they must be the same"
                )
        return None

    def _factor(self, name: str, totals: Mapping[str, int]) -> float:
        return self.config.part_weights.get(name, 1.0) / totals[name]

    def _problem(self, points: Points, totals: Mapping[str, int], weights: Tensor) -> LeastSquares:
        """Collective. Returns the least-squares problem of all ranks' points, reduced."""
        form = self.config.form
        if form == "auto":
            has_few = not self._has_energies and self._count(points, weights) < self._flat.size
            form = "kernel" if has_few else "weights"
        kind = KernelForm if form == "kernel" else WeightsForm
        problem = kind(self._flat.size, self._comm, device=self._flat.device)
        for name, part in self._parts.items():
            self._add(problem, part, self._jets[name], weights, points[name], self._factor(name, totals))
        problem.reduce()
        return problem

    def _add(
        self,
        problem: LeastSquares,
        part: Residual | Energy,
        jet: Pointwise,
        weights: Tensor,
        points: Tensor,
        factor: float,
    ) -> None:
        """Adds the points of one part of the loss to the problem."""
        scale, chunk = factor**0.5, self.config.chunk
        if not isinstance(part, Energy):
            for J_nW, r_n in jacobian_rows(jet, weights, points, chunk=chunk):
                problem.add(scale * J_nW, scale * r_n)
            return
        assert isinstance(problem, WeightsForm)
        for C_nW, slope_W, value in curvature_rows(jet, part.density, weights, points, chunk=chunk):
            problem.add(scale * C_nW, C_nW.new_zeros(len(C_nW)))
            problem.tilt(factor * slope_W, factor * value)

    def _count(self, points: Points, weights: Tensor) -> int:
        """Collective. Returns the number of residuals of all ranks' points; a point may have several."""
        parts = [(points[name], residual) for name, residual in self._jets.items()]
        own = [len(x) * residual(weights, x[0]).numel() for x, residual in parts if len(x)]
        count = torch.tensor([float(sum(own))], dtype=torch.float64, device=weights.device)
        self._comm.all_reduce("exact: residuals", count)
        return int(count)

    def _losses(self, points: Points, totals: Mapping[str, int], weights_KW: Tensor) -> Tensor:
        """Collective. Returns the loss of each vector of weights, [K], float64, the same on all ranks."""
        losses = torch.zeros(len(weights_KW), dtype=torch.float64, device=weights_KW.device)
        for name, part in self._parts.items():
            density = part.density if isinstance(part, Energy) else square
            of_part = sums(self._jets[name], density, weights_KW, points[name], chunk=self.config.chunk)
            losses += self._factor(name, totals) * of_part
        self._comm.all_reduce("exact: losses", losses)
        return losses

    def _next_damping(self, damping: float, share: float) -> float:
        """Returns the damping after a step of this share of lr; short ones show that the direction went too far."""
        first, factor = self.config.damping, self.config.damping_factor
        if share >= LONG:
            return max(damping / factor, min(first, LEAST_DAMPING))
        if share < SHORT:
            return min(damping * factor, max(first, MOST_DAMPING))
        return damping

    def _last_direction(self) -> Tensor:
        parts = [self.state[weight].get("direction", torch.zeros_like(weight)) for weight in self._flat.parameters]
        return torch.cat([part.reshape(-1).double() for part in parts])
