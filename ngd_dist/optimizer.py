"""START HERE. `NGD.step()` is one step of distributed natural gradient descent in a few lines."""

from collections.abc import Callable
from functools import partial
from typing import overload

import torch

from ngd_dist.errors import ConfigError
from ngd_dist.natural_gradient import NaturalGradient
from ngd_dist.step.adaptation import Objective

__all__ = ["NGD"]


class NGD(NaturalGradient):
    """Natural gradient descent as a torch optimizer: preconditions covered layers, leaves the rest to a fallback.

    model: every rank has the same weights, and the first dimension of its inputs counts samples. Bare, compiled, or
        driven by an engine of `ngd_dist.engines`: wrapped in it, after its changes, or the engine itself. If the model
        is bare, NGD averages the gradients over ranks; else the engine has.
    config: the mathematics; see `NGDConfig`.
    param_groups: as for any torch optimizer, with lr, momentum, weight_decay and damping. Parameters in no group are
        left alone. Default: one group with all parameters that are trainable, and those that are unfrozen later. The
        group of a layer's weight gives the layer's damping.
    process_group: the ranks that share a batch; default: the whole world.
    grad_scaler: the GradScaler that scales the loss, if there is one.

    Collective: every rank calls the constructor, `step`, `zero_grad`, `add_param_group`, `state_dict` and
    `load_state_dict`, in the same order; if an engine's own step calls `step`, the loop does not. Copies
    (`copy.deepcopy`, `pickle`) bring a copy of the model along.
    Raises: ConfigError for settings that contradict the model or the group.

    >>> import torch
    >>> from torch import nn
    >>> from ngd_dist import NGD, NGDConfig
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> optimizer = NGD(model, NGDConfig(lr=0.1, damping=0.1))
    >>> for x, y in [(torch.randn(32, 8), torch.randint(4, (32,))) for _ in range(3)]:
    ...     optimizer.zero_grad()
    ...     nn.functional.cross_entropy(model(x), y).backward()
    ...     optimizer.step()
    >>> optimizer.stats.step, optimizer.stats.ages
    (3, [0, 0, 0, 0])
    """

    _step_supports_amp_scaling = True  # so that a GradScaler lets `step` itself skip a step that overflowed

    @overload
    def step(self, closure: None = None, *, objective: Objective | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, objective: Objective | None = None) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, objective: Objective | None = None) -> float | None:
        """Collective. Updates the parameters from their gradients; returns the closure's loss, if one is given.

        objective: returns (loss, output) of the batch, or of a part of it (`part_of`), without differentiating.
            Settings that adapt to the loss evaluate it again (`config.needs_objective`).

        If the `grad` of a parameter is None on every rank, the parameter is left alone, as by torch's optimizers; on
        some ranks, it counts as zero. Raises, on every rank: CaptureError if a layer had more micro-batches than the
        config says; NonFiniteError; InversionError; CollectiveError. ConfigError for parameters that NGD was not built
        with.

        >>> from ngd_dist.config import NGDConfig, QuadraticModel
        >>> model, x, y = nn.Linear(8, 4), torch.randn(32, 8), torch.randint(4, (32,))
        >>> def objective():
        ...     output = model(x)
        ...     return nn.functional.cross_entropy(output, y), output
        >>> optimizer = NGD(model, NGDConfig(step_length=QuadraticModel()))  # chooses lr and momentum
        >>> objective()[0].backward()
        >>> optimizer.step(objective=objective)
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_objective(objective)
        due = self._begin_call()
        with torch.autocast(self._device.type, enabled=False):
            taken = self._directions(due)
            if taken is None:
                return loss
            with self._stopwatch.phase("update"):
                adapted = self._update.move(
                    self.stats.step + 1,
                    self.param_groups,
                    self.state,
                    *taken,
                    objective,
                    partial(self._gradients.of, self),
                )
        self._finish(due, taken[1], adapted)
        self._take_in()
        return loss

    def _check_objective(self, objective: Objective | None) -> None:
        if self.config.needs_objective and objective is None:
            raise ConfigError(
                "step_length quadratic_model and damping_rule levenberg_marquardt evaluate the loss again: call "
                "step(objective=...) with a function that returns (loss, output)"
            )
        if objective is not None and not self.config.needs_objective:
            raise ConfigError("no setting of this config evaluates the loss again: leave out objective")
