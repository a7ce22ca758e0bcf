"""What torch.amp.GradScaler and the optimizer must tell each other.

The scaler multiplies the loss by a factor, so that no gradient vanishes in float16; an optimizer that says
`_step_supports_amp_scaling` finds the factor and the overflow flag as attributes of its own, and acts on them itself.
"""

from typing import Any

import torch
from torch import Tensor

from ngd_dist.errors import ConfigError

__all__ = ["LossScale"]


class LossScale:
    """The factor on the loss of the step that is under way: 1 without a scaler."""

    def __init__(self, scaler: torch.amp.GradScaler | None) -> None:
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._scale: float | None = None

    def begin(self) -> None:
        """Forgets the factor of the last step: the scaler may have changed it."""
        self._scale = None

    def factor(self) -> float:
        """Returns the factor. Reads one number from the device, once per step in which statistics are captured."""
        if self._scale is None:
            self._scale = 1.0 if self._scaler is None else float(self._scaler.get_scale())
        return self._scale

    def overflow(self, optimizer: Any) -> Tensor | None:
        """Returns the scaler's flag, not 0 where a gradient of this rank overflowed; None outside `scaler.step`.

        Raises: ConfigError for a scaler that the optimizer was not given, or was given and is not stepped by.
        """
        found: Tensor | None = getattr(optimizer, "found_inf", None)
        if found is not None and self._scaler is None:
            raise ConfigError(
                "the statistics of this step were scaled by a GradScaler that NGD does not know; give it to the "
                "constructor: NGD(model, config, grad_scaler=scaler)"
            )
        if found is None and self._scaler is not None:
            raise ConfigError("NGD was given a grad_scaler: call scaler.step(optimizer) in place of optimizer.step()")
        return found

    def unscaled(self, optimizer: Any, gradient: Tensor) -> Tensor:
        """Returns the gradient without the factor, unless `scaler.unscale_` has taken it out already."""
        scale: Tensor | None = getattr(optimizer, "grad_scale", None)
        return gradient if scale is None else gradient / scale.to(gradient.device)

    def report_overflow(self, optimizer: Any) -> None:
        """Tells the scaler that some rank overflowed, so that the factors stay the same on all ranks.

        torch has no public way to say so; its own sharded scaler overrides the same method.
        """
        if self._scaler is not None:
            for flag in self._scaler._found_inf_per_device(optimizer).values():
                flag.fill_(1.0)
