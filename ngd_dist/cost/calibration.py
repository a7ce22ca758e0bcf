"""The rates of a device from a short run: steps with and without a refresh, at two numbers of samples."""

from collections.abc import Mapping
from statistics import mean
from typing import Annotated

from pydantic import Field

from ngd_dist.config import NGDConfig, Settings
from ngd_dist.cost.card import ModelCard
from ngd_dist.cost.cluster import Device
from ngd_dist.cost.methods import BYTES
from ngd_dist.cost.seconds import BACKWARD, UPDATE_PASSES, owners_work, statistic_flops
from ngd_dist.cost.setup import Setup
from ngd_dist.errors import ConfigError

__all__ = ["Measured", "StepSeconds", "calibrated"]

Seconds = Annotated[float, Field(gt=0, le=1e6)]
LEAST = 1e-9  # seconds or microseconds: in place of what noise has made negative


class StepSeconds(Settings):
    """Seconds of a step: the median of some. phases: by phase of `StepStats.seconds`, parts of the whole."""

    samples: int = Field(ge=1)
    refreshes: bool = Field(description="Whether all statistics were estimated, and all layers inverted.")
    seconds: Seconds
    phases: Mapping[str, float] = {}


class Measured(Settings):
    """A run of one process on one device, as `ngd plan --measure` writes it."""

    device: str = Field(max_length=200, description="Name of the device that was measured.")
    card: ModelCard
    optimizer: NGDConfig
    steps: tuple[StepSeconds, ...] = Field(min_length=4, max_length=100)

    def at(self, samples: int, *, refreshes: bool) -> StepSeconds:
        """Returns the step of this kind. Raises: ConfigError."""
        for step in self.steps:
            if (step.samples, step.refreshes) == (samples, refreshes):
                return step
        raise ConfigError(
            f"a measured run must have steps with and without a refresh for each number of samples; it has none of "
            f"{samples} samples {'with' if refreshes else 'without'} one: measure again"
        )


def calibrated(device: Device, measured: Measured) -> Device:
    """Returns the device with the rates of the run, as shares of its peak. Raises: ConfigError.

    A step takes a + b N seconds for N samples without a refresh: b is forward and backward, and a has `apply`, the
    update, and calls of each layer. With a refresh it takes c + d N more: c has inversions, and calls of each layer. d,
    the estimates, is read from their own phase: as a difference of differences it would drown in noise.
    """
    sizes = sorted({step.samples for step in measured.steps})
    if len(sizes) < 2:
        raise ConfigError(f"a measured run must have two numbers of samples, got {sizes}: measure again")
    few, many = sizes[0], sizes[-1]
    card, num_layers = measured.card, max(1, len(measured.card.layers))
    setup = Setup(card, measured.optimizer, 1, many)
    plain, full = (
        [measured.at(samples, refreshes=refreshes) for samples in (few, many)] for refreshes in (False, True)
    )
    each, constant = _line(few, many, *(step.seconds for step in plain))
    each_more, _ = _line(few, many, *(step.phases.get("capture", 0.0) for step in full))
    more = mean(f.seconds - p.seconds - each_more * f.samples for f, p in zip(full, plain, strict=True))
    apply_s, update_s = (mean(step.phases.get(name, 0.0) for step in plain) for name in ("apply", "update"))
    refresh_s = mean(step.phases.get("refresh", 0.0) for step in full)
    peak, config = device.tflops * 1e12, measured.optimizer
    inversion, apply = owners_work(setup, config)
    statistics = statistic_flops(setup, config) * config.statistics_fraction

    def share(flops: float, seconds: float) -> float:
        return min(max(flops / max(seconds, LEAST) / peak, LEAST), 20.0)

    return Device.model_validate(
        device.model_dump()
        | {
            "name": measured.device[:100],
            "efficiency": min(1.0, share((1 + BACKWARD) * card.forward_flops, each)),
            "statistics_efficiency": share(statistics, each_more),
            "apply_efficiency": share(apply, apply_s),
            "inverse_efficiency": share(inversion / setup.refreshes, refresh_s),
            "memory_gb_s": max(LEAST, UPDATE_PASSES * BYTES * card.parameters / max(update_s, LEAST) / 1e9),
            "step_us": 0.0,
            "layer_us": max(0.0, (constant - apply_s - update_s) / num_layers * 1e6),
            "refresh_us": max(0.0, (more - refresh_s) / num_layers * 1e6),
        }
    )


def _line(few: int, many: int, at_few: float, at_many: float) -> tuple[float, float]:
    """Returns the slope and the constant of the line through both points."""
    slope = (at_many - at_few) / (many - few)
    return slope, at_few - slope * few
