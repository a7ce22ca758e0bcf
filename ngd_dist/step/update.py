"""From directions to new weights: the length of the step, momentum, decay, and the settings that follow the loss.

Given the same directions, every rank computes bit-identical weights.
"""

import math
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn

from ngd_dist.capture.capture import Capture
from ngd_dist.config import NGDConfig
from ngd_dist.covered import CoveredLayers, Stack
from ngd_dist.distributed import GlobalMeans, StepResult, Sync
from ngd_dist.step.adaptation import Adaptation, GradientsOf, Objective
from ngd_dist.step.damping import damping_after
from ngd_dist.step.fallback import Fallback
from ngd_dist.step.gradients import Gradients
from ngd_dist.step.length import Factors, StepLength
from ngd_dist.step.weights import MomentumMode, apply_
from ngd_dist.telemetry import Adapted

__all__ = ["Update"]


class Update:
    """Moves the weights of the covered layers along their directions, and the plain parameters by the fallback.

    plain: the parameters that no covered layer has. fallback: the optimizer that updates them; None: they take a plain
    gradient step. sync: has cut the directions into pieces, if an engine shards. capture: keeps the rows that a
    layer-wise length reads, and is paused while the loss is evaluated again. factors: those of the newest step; None if
    it was not taken.
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
        sync: Sync,
        capture: Capture,
    ) -> None:
        self.length = StepLength(config, layers, sync.comm, capture, has_pieces=sync.pieces is not None)
        self.factors: Factors | None = None
        self._stacks = stacks
        self._layers = layers
        self._sync = sync
        self._plain = plain
        self._gradients = gradients
        self._fallback = fallback
        self._config = config
        self._adaptation = Adaptation(config, model, sync.comm, capture)
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
        self.set_damping(step, groups)
        if step <= self._config.burn_in:
            self.factors = None
            return Adapted()
        steps, plain, moved = self.directions(means, result)
        if self._fallback is None:
            steps |= {p: gradient.to(self._gradients.weight(p).dtype) for p, gradient in plain.items()}
        else:
            self._fallback.step(groups, plain, self._gradients.weight)
        trial = self._adaptation.begin(step, groups, steps, state, objective, gradients_of)
        if trial is None:
            self.factors = None
            return Adapted(reduction_ratio=math.nan)
        apply_(
            groups,
            steps,
            state,
            momentum_mode=self.momentum_mode,
            rescaled={p: outputs for p, outputs in self._rescaled.items() if p in moved},
            rescaling=self._config.weight_rescaling,
            weight=self._gradients.weight,
            summed=None if self._sync.pieces is None else self._sum,
        )
        return self._adaptation.end(trial, groups, objective)

    def set_damping(self, step: int, groups: Sequence[dict[str, Any]]) -> None:
        """Sets the groups' damping for this step."""
        for group in groups:
            group["damping"] = damping_after(self._config.damping_rule, group, step)

    def directions(
        self, means: GlobalMeans, result: StepResult
    ) -> tuple[dict[nn.Parameter, Tensor], dict[nn.Parameter, Tensor], Collection[nn.Parameter]]:
        """Collective. Returns the step of each parameter of a covered layer, and the gradient of each other one.

        If an engine shards, they are this rank's pieces, [length]. They are of those parameters alone that have a
        gradient on any rank, which come third.
        """
        moved = self._gradients.differentiated(everywhere=means.missing == 0)
        scaled, self.factors = self.length.scale(result.directions, result.inner)
        if self._sync.pieces is None:
            steps = dict(pair for stack in self._stacks for pair in stack.split(scaled))
        else:
            steps = dict(pair for name in self._layers for pair in self._split_pieces(name, scaled[name]))
        gradients = {p: g for p, g in zip(self._plain, means.plain, strict=True) if p in moved and g.numel()}
        steps = steps if means.missing == 0 else {p: step for p, step in steps.items() if p in moved}
        return steps, gradients, moved

    def _split_pieces(self, name: str, pieces: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        assert self._sync.pieces is not None
        parts = pieces.split(self._sync.pieces.lengths(name))
        for p, step in zip(self._layers[name].layer.parameters, parts, strict=True):
            if step.numel():
                yield p, step.to(self._gradients.weight(p).dtype)

    def _sum(self, squares: Tensor) -> Tensor:
        squares = squares.to(self._sync.comm.device)
        self._sync.comm.all_reduce("norms of weights", squares, kind="step length")
        return squares
