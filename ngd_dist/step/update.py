"""From directions to new weights: the length of the step, momentum, decay, and the settings that follow the loss.

Given the same directions, every rank computes bit-identical weights.
"""

import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn

from ngd_dist.capture.capture import Capture
from ngd_dist.config import NGDConfig
from ngd_dist.covered import CoveredLayers, Stack
from ngd_dist.distributed import GlobalMeans, StepResult
from ngd_dist.distributed.comm import Communicator
from ngd_dist.step.adaptation import Adaptation, GradientsOf, Objective
from ngd_dist.step.damping import damping_after
from ngd_dist.step.fallback import Fallback
from ngd_dist.step.gradients import Gradients
from ngd_dist.step.length import StepLength
from ngd_dist.step.weights import MomentumMode, apply_
from ngd_dist.telemetry import Adapted

__all__ = ["Update"]


class Update:
    """Moves the weights of the covered layers along their directions, and the plain parameters by the fallback.

    plain: the parameters that no covered layer has. fallback: the optimizer that updates them; None: they take a plain
    gradient step. capture: keeps the rows that a layer-wise length reads, and is paused while the loss is evaluated
    again.
    """

    def __init__(
        self,
        layers: CoveredLayers,
        stacks: Sequence[Stack],
        plain: Sequence[nn.Parameter],
        gradients: Gradients,
        fallback: Fallback | None,
        model: nn.Module,
        config: NGDConfig,
        comm: Communicator,
        capture: Capture,
    ) -> None:
        self.length = StepLength(config, layers, comm, capture)
        self._stacks = stacks
        self._plain = plain
        self._gradients = gradients
        self._fallback = fallback
        self._config = config
        self._adaptation = Adaptation(config, model, comm, capture)
        of_layers = [covered.layer for covered in layers.values()]
        matrices = [
            layer for layer in of_layers if layer.shape.fisher == "kronecker" and not layer.shape.has_one_hot_inputs
        ]
        self._rescaled = {layer.parameters[0]: layer.shape.blocks * layer.shape.outputs for layer in matrices}

    @property
    def momentum_mode(self) -> MomentumMode:
        """The way in which the momentum of the param groups takes part in the update."""
        return self._adaptation.momentum_mode

    def move(
        self,
        step: int,
        groups: list[dict[str, Any]],
        state: Mapping[Any, MutableMapping[str, Any]],
        means: GlobalMeans,
        result: StepResult,
        objective: Objective | None,
        gradients_of: GradientsOf,
    ) -> Adapted:
        """Collective. Moves the parameters that have a gradient on any rank, unless the step is of the burn-in.

        gradients_of: this rank's gradients of parameters, unscaled.
        Sets the groups' damping for this step and, if the config chooses them, their lr and momentum.
        Raises: NonFiniteError, on all ranks, with no weight changed.
        """
        for group in groups:
            group["damping"] = damping_after(self._config.damping_rule, group, step)
        if step <= self._config.burn_in:
            return Adapted()
        steps = self._steps(groups, means, result)
        trial = self._adaptation.begin(step, groups, steps, state, objective, gradients_of)
        if trial is None:
            return Adapted(reduction_ratio=math.nan)
        apply_(
            groups,
            steps,
            state,
            momentum_mode=self.momentum_mode,
            rescaled=self._rescaled,
            rescaling=self._config.weight_rescaling,
        )
        return self._adaptation.end(trial, groups, objective)

    def _steps(
        self, groups: Sequence[Mapping[str, Any]], means: GlobalMeans, result: StepResult
    ) -> dict[nn.Parameter, Tensor]:
        """Returns the step of each parameter; the fallback has moved its parameters by then."""
        differentiated = self._gradients.differentiated(everywhere=means.missing == 0)
        directions = self.length.scale(result.directions, result.inner)
        steps = {p: step for stack in self._stacks for p, step in stack.split(directions)}
        gradients = {p: g for p, g in zip(self._plain, means.plain, strict=True) if p in differentiated}
        if self._fallback is None:
            steps |= ((p, gradient.to(p.dtype)) for p, gradient in gradients.items())
        else:
            self._fallback.step(groups, gradients)
        return steps if means.missing == 0 else {p: step for p, step in steps.items() if p in differentiated}
