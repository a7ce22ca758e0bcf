"""The factor on the loss, of an engine or of torch.amp.GradScaler, and the overflow flag that the latter gives.

The scaler multiplies the loss by a factor, so that no gradient vanishes in float16. If an optimizer sets
`_step_supports_amp_scaling`, the scaler gives it the factor and the flag as attributes, and the optimizer acts on them.
"""

from typing import Any

import torch
from torch import Tensor

from ngd_dist.engines import Engine
from ngd_dist.errors import ConfigError

__all__ = ["LossScale"]


class LossScale:
    """The factor on the loss of the step that is under way: the engine's without a scaler, mostly 1.

    is_divided_out: whether the loop has `scaler.unscale_` take the factor out before a step, and judge the overflow.
    """

    def __init__(
        self, scaler: torch.amp.GradScaler | None, engine: Engine | None = None, *, is_divided_out: bool = False
    ) -> None:
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._engine = engine or Engine()
        self._is_divided_out = is_divided_out
        self._scale: float | None = None

    def begin(self) -> None:
        """Forgets the factor of the last step: the scaler may have changed it."""
        # An engine changes its own before it steps, when rows of this step may still wait for the old one.
        self._scale = None if self._scaler is not None else self._engine.loss_scale()

    def factor(self) -> float:
        """Returns the factor. Reads one number from the device, once per step in which statistics are captured."""
        if self._scale is None:
            self._scale = self._engine.loss_scale() if self._scaler is None else float(self._scaler.get_scale())
        return self._scale

    def overflow(self, optimizer: Any) -> Tensor | None:
        """Returns the scaler's flag, not 0 if a gradient of this rank overflowed; None outside `scaler.step`.

        Raises: ConfigError if the optimizer was not given the scaler, or was given one and is stepped without it.
        """
        flag: Tensor | None = getattr(optimizer, "found_inf", None)
        if flag is not None and self._scaler is None:
            raise ConfigError(
                "the statistics of this step were scaled by a GradScaler that NGD does not know; give it to the "
                "constructor: NGD(model, config, grad_scaler=scaler)"
            )
        if flag is None and self._scaler is not None and not self._is_divided_out:
            raise ConfigError("NGD was given a grad_scaler: call scaler.step(optimizer) in place of optimizer.step()")
        return flag

    def unscaled(self, optimizer: Any, gradients: list[Tensor]) -> list[Tensor]:
        """Returns the gradients without the factor; `scaler.unscale_` may have taken it out already."""
        scale: Tensor | None = getattr(optimizer, "grad_scale", None)
        return gradients if scale is None else [gradient / scale.to(gradient.device) for gradient in gradients]

    def report_overflow(self, optimizer: Any) -> None:
        """Tells the scaler that some rank overflowed, so that the factors stay the same on all ranks.

        torch has no public method for it; its sharded scaler overrides the same one.
        """
        if self._scaler is not None and not self._is_divided_out:
            for flag in self._scaler._found_inf_per_device(optimizer).values():
                flag.fill_(1.0)
