"""Settings that follow the loss: lr and momentum from the exact quadratic model, damping by Levenberg-Marquardt.

Source: [MG15] sections 6.5 and 7.
"""

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor, nn

from ngd_dist.capture.capture import Capture
from ngd_dist.config import LevenbergMarquardt, NGDConfig, QuadraticModel
from ngd_dist.distributed.comm import Communicator
from ngd_dist.errors import NonFiniteError
from ngd_dist.step.damping import levenberg_marquardt, reduction_ratio
from ngd_dist.step.quadratic import Objective, curvature_products, evaluate, predicted_change, solve_lengths
from ngd_dist.step.weights import MomentumMode
from ngd_dist.telemetry import Adapted

__all__ = ["Adaptation", "GradientsOf", "Objective", "Trial"]

Groups = list[dict[str, Any]]
Steps = Mapping[nn.Parameter, Tensor]
GradientsOf = Callable[[Sequence[nn.Parameter]], list[Tensor]]


@dataclass(frozen=True, slots=True)
class Trial:
    """A step under trial: the weights before it, if its success is to be judged, and the model's prediction.

    `model`: the loss before the step and the change that the quadratic model predicts, if it chose the step.
    """

    is_judged: bool = False
    before: Steps = field(default_factory=dict)
    model: tuple[float, float] | None = None


class Adaptation:
    """Chooses lr and momentum before a step, and damping from its success. Both are the same on every rank.

    `capture` is paused while the objective is evaluated, so that these passes stay out of the statistics.
    """

    def __init__(
        self,
        config: NGDConfig,
        model: nn.Module,
        comm: Communicator,
        capture: Capture,
    ) -> None:
        self._rule = config.damping_rule
        self._chooses = isinstance(config.length, QuadraticModel)
        self._momentum_mode: MomentumMode = "chosen" if self._chooses else config.momentum_mode
        self._skips = config.non_finite == "skip"
        self._model = model
        self._comm = comm
        # The objective of a summed loss is a sum over ranks too.
        self._shares = 1 if config.loss_reduction == "sum" else comm.world_size
        self._capture = capture

    @property
    def momentum_mode(self) -> MomentumMode:
        """The way in which the momentum of the param groups takes part in the update."""
        return self._momentum_mode

    def begin(
        self,
        step: int,
        groups: Groups,
        directions: Steps,
        state: Mapping[Any, MutableMapping[str, Any]],
        objective: Objective | None,
        gradients_of: GradientsOf,
    ) -> Trial | None:
        """Collective if the settings need an objective. Sets lr and momentum if the quadratic model chooses them.

        gradients_of: this rank's gradients of parameters; the mean over ranks is that of the global batch.
        Returns None, on all ranks, for a step to be skipped: its quadratic model has NaN or infinity.
        Raises: NonFiniteError, on all ranks, for the same unless such steps are to be skipped.
        """
        if objective is None:
            return Trial()
        is_judged = isinstance(self._rule, LevenbergMarquardt) and step % self._rule.every == 0
        before = {p: p.detach().clone() for p in directions} if is_judged else {}
        if not self._chooses:
            return Trial(is_judged, before)
        model = self._choose(groups, directions, state, objective, gradients_of)
        if model is not None:
            return Trial(is_judged, before, model)
        if self._skips:
            return None
        raise NonFiniteError(
            f"the quadratic model of the loss is NaN or infinite in step {step}; no weight was changed. Raise damping, "
            "or set non_finite='skip' to go on with the next batch"
        )

    def end(self, trial: Trial, groups: Groups, objective: Objective | None) -> Adapted:
        """Collective if the trial is judged. Sets the damping from the change of the loss."""
        rule = self._rule
        if objective is None or not trial.is_judged or not isinstance(rule, LevenbergMarquardt):
            return Adapted()
        loss, predicted = trial.model or self._model_of(groups, trial.before, objective)
        after = self._evaluate(objective)
        rho = reduction_ratio(after - loss, predicted)
        for group in groups:
            group["damping"] = levenberg_marquardt(rule, group["damping"], rho)
        return Adapted(reduction_ratio=rho)

    def _choose(
        self,
        groups: Groups,
        directions: Steps,
        state: Mapping[Any, MutableMapping[str, Any]],
        objective: Objective,
        gradients_of: GradientsOf,
    ) -> tuple[float, float] | None:
        """Sets every group's lr and momentum; returns the objective's loss and the change that the model predicts.

        The model's slope is that of the whole batch, which is there anyway, and only its curvature that of the
        objective ([MG15] 8). The prediction has the objective's own slope, since the change of its loss is compared
        with it. None, on all ranks, if the model has NaN or infinity.
        """
        down = {p: -direction for p, direction in directions.items()}
        last = {p: -state[p]["momentum_buffer"] for p in directions if "momentum_buffer" in state[p]}
        tangents = [down, last] if last else [down]
        parameters = list(directions)
        gradient = dict(zip(parameters, gradients_of(parameters), strict=True))
        loss, DFD, Dg, slopes = self._products(objective, tangents, [_dot(tangent, gradient) for tangent in tangents])
        DD = self._damped_products(groups, tangents)
        lengths = solve_lengths(DFD, DD, slopes, damping=1.0)
        if not all(map(math.isfinite, lengths)):
            return None
        for group in groups:
            group["lr"], group["momentum"] = lengths
        return loss, predicted_change(lengths[: len(tangents)], DFD, DD, Dg, damping=1.0)

    def _model_of(self, groups: Groups, before: Steps, objective: Objective) -> tuple[float, float]:
        """Returns the loss before a step that was taken, and the change that the model would have predicted."""
        after = {p: p.detach().clone() for p in before}
        tangents = [{p: after[p] - old for p, old in before.items()}]
        _write(before)
        try:
            loss, DFD, Dg, _ = self._products(objective, tangents)
        finally:
            _write(after)
        return loss, predicted_change([1.0], DFD, self._damped_products(groups, tangents), Dg, damping=1.0)

    def _products(
        self, objective: Objective, tangents: Sequence[Steps], others: Sequence[Tensor] = ()
    ) -> tuple[float, Tensor, Tensor, Tensor]:
        """Collective. Returns, as means over ranks, the objective's loss, D^T F D and D^T grad, and other numbers."""
        with self._capture.paused():
            loss, DFD, Dg = curvature_products(self._model, objective, tangents)
        numbers = torch.cat([loss.view(1), DFD.flatten(), Dg, *(number.to(Dg).view(1) for number in others)])
        self._comm.all_reduce("quadratic model", numbers, kind="adaptation")
        k = len(tangents)
        means = (numbers / self._shares).cpu().split([1, k * k, k, len(others)])
        return float(means[0]), means[1].view(k, k), means[2], means[3]

    def _evaluate(self, objective: Objective) -> float:
        with self._capture.paused():
            loss = evaluate(self._model, objective).view(1)
        self._comm.all_reduce("loss after the step", loss, kind="adaptation")
        return float(loss) / self._shares

    def _damped_products(self, groups: Groups, tangents: Sequence[Steps]) -> Tensor:
        """Returns D^T D, [k, k], with each parameter's part times the damping of its group."""
        damping = {p: group["damping"] for group in groups for p in group["params"]}
        pairs = list(combinations_with_replacement(range(len(tangents)), 2))
        inner = torch.stack([_dot(tangents[i], tangents[j], damping) for i, j in pairs]).tolist()
        total = torch.zeros(len(tangents), len(tangents), dtype=torch.float64)
        for (i, j), product in zip(pairs, inner, strict=True):
            total[i, j] = total[j, i] = product
        return total


def _dot(x: Steps, y: Steps, weights: Mapping[nn.Parameter, float] | None = None) -> Tensor:
    """Returns the inner product over the parameters that both have, times their weights, 0-d float64."""
    products = [
        torch.sum(x[p] * y[p], dtype=torch.float64) * (1.0 if weights is None else weights[p]) for p in x if p in y
    ]
    return torch.stack(products).sum() if products else torch.zeros((), dtype=torch.float64)


def _write(values: Steps) -> None:
    for parameter, value in values.items():
        parameter.detach().copy_(value)
