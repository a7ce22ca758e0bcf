"""All mathematical settings of the optimizer, as frozen pydantic models. Imports without torch.

Each choice is its own class, told apart by ``kind``; an unknown field is an error, never ignored.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "KFAC",
    "AdaptiveInterval",
    "AllReduce",
    "FixedInterval",
    "NGDConfig",
    "OwnerSharded",
    "Single",
    "Thresholds",
]


class Settings(BaseModel):
    """Base of every configuration class: frozen, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class KFAC(Settings):
    """Kronecker factors A and G per layer, inverted after damping with the pi split ([MG15] 6.3)."""

    kind: Literal["kfac"] = "kfac"
    sharing: Literal["expand", "reduce"] = Field(
        "expand",
        description="How a weight used at several positions of a sample (pixels, tokens) is treated. expand: each "
        "position counts as a sample; reduce: inputs are averaged and gradients summed over positions first, which is "
        "right where the positions are pooled into one prediction ([E23]).",
    )


class Thresholds(Settings):
    """Relative Frobenius change below which two values of a statistic count as similar.

    A threshold must exceed sqrt(2) times the relative sampling noise of its statistic at the batch size in use:
    two independent draws differ by that much even when nothing has changed, and the interval then never grows.
    """

    A: float = Field(0.1, gt=0, description="Second moment of layer inputs.")
    G: float = Field(0.1, gt=0, description="Second moment of output gradients.")
    F: float = Field(0.1, gt=0, description="Unit-wise Fisher blocks of normalisation layers.")


class AdaptiveInterval(Settings):
    """SP-NGD's stale statistics: a statistic's interval grows while it stays similar ([OT20])."""

    kind: Literal["adaptive"] = "adaptive"
    thresholds: Thresholds = Thresholds()
    max_interval: int = Field(1000, ge=1, description="Steps; no statistic stays unrefreshed for longer than this.")


class FixedInterval(Settings):
    """Every statistic is refreshed once in `steps` optimizer steps."""

    kind: Literal["fixed"] = "fixed"
    steps: int = Field(1, ge=1, description="Optimizer steps between two refreshes of one statistic.")


class Single(Settings):
    """One process; nothing travels."""

    kind: Literal["single"] = "single"


class AllReduce(Settings):
    """Statistics and gradients are averaged on all ranks; each rank inverts and preconditions every layer."""

    kind: Literal["all_reduce"] = "all_reduce"


class OwnerSharded(Settings):
    """Statistics are reduced to the layer's owner, which inverts and preconditions; directions are gathered."""

    kind: Literal["owner_sharded"] = "owner_sharded"


StalenessChoice = Annotated[AdaptiveInterval | FixedInterval, Field(discriminator="kind")]
StrategyChoice = Annotated[Single | AllReduce | OwnerSharded, Field(discriminator="kind")]


class NGDConfig(Settings):
    """Everything that decides the update of `NGD`.

    lr and damping default to the values that won among six settings on Fashion-MNIST at batch 4,096
    (benchmarks/results). The empirical Fisher shrinks with the loss, so let lr fall towards 0 over the run.
    """

    preconditioner: KFAC = KFAC()
    staleness: StalenessChoice = AdaptiveInterval()
    strategy: StrategyChoice | None = Field(
        None, description="None: `single` in one process, `owner_sharded` in several."
    )
    lr: float = Field(0.1, gt=0, description="eta: weights move by -lr times the momentum buffer.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Buffer = momentum * buffer + direction, as torch's SGD.")
    weight_decay: float = Field(
        0.0, ge=0, description="Decoupled: weights shrink by lr * weight_decay each step; the direction is untouched."
    )
    damping: float = Field(
        0.1,
        gt=0,
        description="lambda, in units of squared per-sample gradient; sqrt(lambda) is added to each factor (pi split).",
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Weight of the past in the moving average of a statistic; 0: the newest batch only.",
    )
    stagger: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Fraction of an interval by which a refresh may come early, so that layers refresh on different "
        "steps; 0 turns staggering off.",
    )
    statistics_wire: Literal["float32", "bfloat16"] = Field(
        "float32", description="Dtype in which statistics cross the network; float64 models always send float64."
    )
    micro_batches: int = Field(
        1, ge=1, description="Backward passes per optimizer step; divide each micro-batch's mean loss by this."
    )
    loss_reduction: Literal["mean", "sum"] = Field(
        "mean", description="How the loss reduces over the samples of a micro-batch; needed to recover per-sample g."
    )
