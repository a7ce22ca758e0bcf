"""The schedules of refreshes."""

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticKnownError

from ngd_dist.config.choice import Choice, Settings
from ngd_dist.config.methods import DEFAULT_THRESHOLD, EKFAC, KFAC, LNGD, PRECONDITIONERS, SENG, Eva

if TYPE_CHECKING:
    from ngd_dist.config.ngd import NGDConfig

__all__ = ["AdaptiveInterval", "FixedInterval", "StalenessChoice", "Thresholds"]


def _of_a_method(statistic: str) -> str:
    """Returns the name of a statistic that a registered method has. Raises: PydanticKnownError for any other."""
    if not any(statistic in choice.thresholds for choice in PRECONDITIONERS.values()):
        raise PydanticKnownError("extra_forbidden")
    return statistic


class Thresholds(Settings):
    """||X - Y|| / min(||X||, ||Y||) below which values of a statistic count as similar, if its noise is no larger."""

    # A method from outside brings statistics with other names; a job has none of those.
    model_config = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": False})
    __pydantic_extra__: dict[Annotated[str, AfterValidator(_of_a_method)], Annotated[float, Field(gt=0)]]

    A: float = Field(
        default=KFAC.thresholds["A"], gt=0, description="K-FAC, EKFAC, SINGD: second moment of layer inputs."
    )
    G: float = Field(
        default=KFAC.thresholds["G"], gt=0, description="K-FAC, EKFAC, SINGD: second moment of output gradients."
    )
    S: float = Field(default=EKFAC.thresholds["S"], gt=0, description="EKFAC: second moments in the eigenbasis.")
    Phi: float = Field(
        default=LNGD.thresholds["Phi"], gt=0, description="LNGD, TKFAC: weighted second moment of layer inputs."
    )
    Psi: float = Field(
        default=LNGD.thresholds["Psi"],
        gt=0,
        description="LNGD, TKFAC: weighted second moments of outputs, or of their gradients.",
    )
    U: float = Field(default=SENG.thresholds["U"], gt=0, description="SENG: gradients of the samples of a rank.")
    a: float = Field(default=Eva.thresholds["a"], gt=0, description="Eva: mean of layer inputs.")
    g: float = Field(default=Eva.thresholds["g"], gt=0, description="Eva: mean of output gradients.")
    F: float = Field(default=DEFAULT_THRESHOLD, gt=0, description="Unit-wise Fisher blocks of normalisation layers.")

    def of(self, statistic: str) -> float | None:
        """Returns the threshold that is set for the statistic, or None."""
        return dict(self).get(statistic)


class AdaptiveInterval(Choice):
    """SP-NGD's stale statistics: a statistic's interval grows while it stays similar ([OT20])."""

    kind: Literal["adaptive"] = "adaptive"
    thresholds: Thresholds = Field(default=Thresholds(), description="By statistic.")
    noise_margin: float = Field(
        default=1.5,
        ge=0,
        description="A threshold is at least this times the sampling noise that is measured of the change, sqrt(2) "
        "times that of one batch without ema_decay, but at most 1. 0: thresholds are fixed, and a statistic with more "
        "noise is refreshed in every step.",
    )
    criterion: Literal["change", "error"] = Field(
        default="change",
        description="Measure by which a statistic counts as changed. change: its relative change. error: the distance "
        "of the inverse in use from that of the new value, ||I - (X + damping) inverse|| / sqrt(n), or of a basis of "
        "EKFAC from diagonalising it; below error_threshold the old one stays in use and nothing is inverted. A "
        "statistic without either follows its change: normalisation layers, exact damping, factors kept as rows.",
    )
    error_threshold: float = Field(
        default=0.25,
        gt=0,
        lt=1,
        description="With criterion error. From half of it on an interval grows no more, from all of it on it is "
        "halved and the inverse made again.",
    )
    max_interval: int = Field(default=1000, ge=1, description="Steps; no longer interval is planned for a statistic.")

    @model_validator(mode="after")
    def _threshold_is_read(self) -> Self:
        # A job that was written out and is read again has the default too.
        is_chosen = self.error_threshold != type(self).model_fields["error_threshold"].default
        if self.criterion == "change" and is_chosen:
            raise ValueError("criterion change measures no error: leave out error_threshold, or say criterion error")
        return self

    @property
    def measures_noise(self) -> bool:
        """Whether the sampling noise of statistics is measured."""
        return self.noise_margin > 0


class FixedInterval(Choice):
    """Every statistic is refreshed once in `steps` optimizer steps; under EKFAC a basis lasts for two at least."""

    kind: Literal["fixed"] = "fixed"
    steps: int = Field(default=1, ge=1, description="Optimizer steps between two refreshes of one statistic.")
    statistics_steps: int | None = Field(
        default=None,
        ge=1,
        description="Optimizer steps between two estimates of one statistic; `steps` is then the interval of its "
        "inverse alone, and ema_decay averages the estimates between. 1 with steps 10 is the usual setting of other "
        "libraries. None: a statistic is estimated when it is inverted.",
    )

    @model_validator(mode="after")
    def _statistics_come_first(self) -> Self:
        if self.statistics_steps is not None and self.statistics_steps > self.steps:
            raise ValueError(
                f"an inverse is made of new statistics: statistics_steps must be <= steps, got {self.statistics_steps} "
                f"and {self.steps}"
            )
        return self

    @property
    def estimate_steps(self) -> int:
        """Optimizer steps between two estimates of one statistic."""
        return self.steps if self.statistics_steps is None else self.statistics_steps

    @property
    def measures_noise(self) -> bool:
        """Whether the sampling noise of statistics is measured."""
        return False

    def refuses(self, config: "NGDConfig") -> str | None:
        cap, every = config.refresh_cap, self.estimate_steps
        if cap is not None and cap * every < 1:
            return (
                f"staleness fixed with steps {every} refreshes 1/{every} of all statistics in a step: "
                f"refresh_cap must be at least that, got {cap}"
            )
        if every < self.steps and config.ema_decay == 0:
            return (
                f"statistics between two inversions count in a moving average alone: set ema_decay above 0, or leave "
                f"out statistics_steps {every}"
            )
        return None


StalenessChoice = Annotated[AdaptiveInterval | FixedInterval, Field(discriminator="kind")]
