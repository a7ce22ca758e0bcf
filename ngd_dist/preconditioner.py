"""`Preconditioner`: the natural gradient alone, for another optimizer to go on from."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ngd_dist.config import KLClip, NGDConfig
from ngd_dist.errors import ConfigError
from ngd_dist.natural_gradient import NaturalGradient
from ngd_dist.telemetry import Adapted

__all__ = ["Preconditioner"]

OF_THE_UPDATE = ("momentum", "momentum_mode", "weight_decay", "weight_rescaling", "burn_in", "fallback")


class Preconditioner(NaturalGradient):
    """Turns the gradient of covered layers into the natural gradient in place; SGD, LAMB or Muon goes on from there.

    The arguments are those of `NGD`, without the settings of the update: momentum, weight decay, burn-in, fallback.
    They are the other optimizer's, and so is lr: give it here for `clip` kl alone, which bounds lr^2 d^T F d, and keep
    `param_groups[0]["lr"]` equal to the other's. Parameters that no layer covers keep their gradient, of which a bare
    model on several ranks gets the mean.

    An optimizer that divides by the size of past gradients, as Adam does, leaves of the natural gradient its direction,
    and of that mostly signs: its length, and so the damping, then mean little. SGD with momentum keeps both.

    grad_scaler: call `scaler.unscale_(optimizer)` before `step`. process_group, param_groups: as for `NGD`.
    Raises: ConfigError for settings of the update. As KAISA's code (arXiv:2107.01739).

    >>> model = nn.Linear(8, 4)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> preconditioner = Preconditioner(model, NGDConfig(damping=0.1))
    >>> for x, y in [(torch.randn(32, 8), torch.randint(4, (32,))) for _ in range(3)]:
    ...     optimizer.zero_grad()
    ...     nn.functional.cross_entropy(model(x), y).backward()
    ...     if preconditioner.step():
    ...         optimizer.step()
    """

    updates_weights = False

    def __init__(
        self,
        model: nn.Module,
        config: NGDConfig | None = None,
        *,
        param_groups: Iterable[dict[str, Any]] | None = None,
        process_group: dist.ProcessGroup | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        config = NGDConfig.model_validate(config or {})
        _check(config)
        groups = None if param_groups is None else [dict(group) for group in param_groups]
        for group in groups or []:
            _check_group(group)
        super().__init__(
            model,
            config.model_copy(update={"momentum": 0.0}),
            param_groups=groups,
            process_group=process_group,
            grad_scaler=grad_scaler,
        )
        if grad_scaler is not None and self._comm.world_size > 1 and not self._engine.averages_gradients:
            raise ConfigError(
                "grad_scaler on several ranks needs an engine that averages gradients before the scaler sees them: "
                "take an engine, or bfloat16 without a scaler"
            )

    @torch.no_grad()
    def step(self) -> bool:  # type: ignore[override]
        """Collective. Makes the gradients natural; returns whether there is a step to take.

        Call it between `loss.backward()` and the other optimizer's `step`; an engine that steps by itself calls it. If
        a gradient is NaN or infinite on any rank, `non_finite` "raise" raises on all ranks; "skip" returns False, and
        leaves no gradient: `grad` is None, or a piece of zeros. Raises: as `NGD.step`.

        >>> model = nn.Linear(8, 4)
        >>> preconditioner = Preconditioner(model)
        >>> model(torch.randn(32, 8)).square().mean().backward()
        >>> preconditioner.step()
        True
        """
        due = self._begin_call()
        for group in self.param_groups:
            group["lr"] = self._engine.lr(group)
        with torch.autocast(self._device.type, enabled=False):
            taken = self._directions(due)
            if taken is None:
                self._clear_gradients()
                return False
            with self._stopwatch.phase("update"):
                self._update.set_damping(self.stats.step + 1, self.param_groups)
                directions, plain, _ = self._update.directions(*taken)
                self._write(directions | plain)
        self._finish(due, taken[1], Adapted())
        self._take_in()
        return True

    def _write(self, directions: Mapping[nn.Parameter, Tensor]) -> None:
        for p, direction in directions.items():
            gradient = self._gradients.read(p)
            if gradient is not None and gradient is not direction:
                gradient.copy_(direction)
            elif gradient is None and not self._engine.is_sharded:
                p.grad = direction.to(p.dtype, copy=True)

    def _clear_gradients(self) -> None:
        self._gradients.begin()  # the skipped step has let them go
        for piece in self._gradients.pieces.values():
            if piece.gradient is not None:
                piece.gradient.zero_()
        if not self._engine.is_sharded:
            for p in self._names:
                p.grad = None


def _check(config: NGDConfig) -> None:
    chosen = [name for name in OF_THE_UPDATE if name in config.model_fields_set]
    if chosen:
        raise ConfigError(
            f"{', '.join(chosen)} must be left out of a Preconditioner's config: the optimizer after it decides them"
        )
    if "lr" in config.model_fields_set and not isinstance(config.clip, KLClip):
        raise ConfigError("lr must be left out of a Preconditioner's config: only clip kl reads it")
    if config.needs_objective:
        raise ConfigError(
            f"step_length {config.length.kind} with damping_rule {config.damping_rule.kind} decides the whole step, "
            "and a Preconditioner does not take it: take NGD"
        )


def _check_group(group: Mapping[str, Any]) -> None:
    chosen = [name for name in ("momentum", "weight_decay") if name in group]
    if chosen:
        raise ConfigError(f"{', '.join(chosen)} must be left out of a Preconditioner's param_groups, got {chosen}")
