"""The rates of a device from a short run: steps with and without a refresh, at two numbers of samples."""

from collections.abc import Mapping
from statistics import mean
from typing import Annotated

from pydantic import Field

from ngd_dist.config import NGDConfig, Settings
from ngd_dist.cost.card import ModelCard
from ngd_dist.cost.cluster import Device
from ngd_dist.cost.forms import BYTES
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
    in_turn_s: float | None = Field(
        default=None, gt=0, le=1e6, description="Seconds of a step, of the fewest samples, if layers refresh in turn."
    )
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

    Without a refresh a step takes a + b N seconds for N samples beside `apply` and the update: b is forward and
    backward, and a is calls of each layer. With a refresh it takes c + d N more: c has inversions, and calls of each
    layer. d, the estimates, is read from their own phase: as a difference of differences it would drown in noise.
    Layers that are alike share calls if they refresh together; an interval with layers in turn shows what that saves.
    """
    sizes = sorted({step.samples for step in measured.steps})
    if len(sizes) < 2:
        raise ConfigError(f"a measured run must have two numbers of samples, got {sizes}: measure again")
    few, many = sizes[0], sizes[-1]
    card, num_layers = measured.card, max(1, len(measured.card.layers))
    setups = [Setup(card, measured.optimizer, 1, samples) for samples in (few, many)]
    plain, full = (
        [measured.at(samples, refreshes=refreshes) for samples in (few, many)] for refreshes in (False, True)
    )
    each, constant = _line(few, many, *(step.seconds - _seconds_of(step, "apply", "update") for step in plain))
    each_more, _ = _line(few, many, *(_seconds_of(step, "capture") for step in full))
    more = mean(f.seconds - p.seconds - each_more * f.samples for f, p in zip(full, plain, strict=True))
    apply_s, update_s = (sum(_seconds_of(step, name) for step in plain) for name in ("apply", "update"))
    refresh_s = mean(_seconds_of(step, "refresh") for step in full)
    if each <= 0:
        raise ConfigError(
            f"a step of {many} samples took no longer than one of {few}, so that the time of a sample can't be told: "
            "measure again with a larger batch.micro_size"
        )
    forward_backward = (1 + BACKWARD) * card.forward_flops / each
    peak, config = min(max(device.tflops * 1e12, forward_backward), 1e18), measured.optimizer
    inversion, _ = owners_work(setups[1], config)
    apply = sum(owners_work(setup, config)[1] for setup in setups)
    statistics = statistic_flops(setups[1], config) * config.statistics_fraction

    in_turn = 0.0
    share_due = setups[0].refreshes
    if measured.in_turn_s is not None and share_due < 1:
        together = plain[0].seconds + share_due * (full[0].seconds - plain[0].seconds)
        in_turn = (measured.in_turn_s - together) / (share_due * (1 - share_due) * num_layers)

    def share(flops: float, seconds: float) -> float:
        return min(max(flops / max(seconds, LEAST) / peak, LEAST), 20.0)

    return Device.model_validate(
        device.model_dump()
        | {
            "name": measured.device[:100],
            "tflops": peak / 1e12,
            "efficiency": min(max(LEAST, forward_backward / peak), 1.0),
            "statistics_efficiency": share(statistics, each_more),
            "apply_efficiency": share(apply, apply_s),
            "inverse_efficiency": share(inversion / setups[1].refreshes, refresh_s),
            "memory_gb_s": min(
                max(2 * UPDATE_PASSES * BYTES * card.parameters / max(update_s, LEAST) / 1e9, LEAST), 1e6
            ),
            "step_us": 0.0,
            "layer_us": max(0.0, constant / num_layers * 1e6),
            "refresh_us": max(0.0, (more - refresh_s) / num_layers * 1e6),
            "in_turn_us": max(0.0, in_turn * 1e6),
        }
    )


def _seconds_of(step: StepSeconds, *phases: str) -> float:
    """Returns the seconds of these phases of a step."""
    return sum(step.phases.get(name, 0.0) for name in phases)


def _line(few: int, many: int, at_few: float, at_many: float) -> tuple[float, float]:
    """Returns the slope and the constant of the line through both points."""
    slope = (at_many - at_few) / (many - few)
    return slope, at_few - slope * few
