"""`NGDConfig`: all choices and numbers together."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from ngd_dist.config.choice import Choice, Settings
from ngd_dist.config.damping import ConstantDamping, DampingChoice
from ngd_dist.config.distribution import StrategyChoice
from ngd_dist.config.fisher import Empirical, FisherChoice
from ngd_dist.config.inversion import AutomaticInversion, InversionChoice
from ngd_dist.config.methods import KFAC, PreconditionerChoice
from ngd_dist.config.staleness import AdaptiveInterval, StalenessChoice
from ngd_dist.config.step import (
    AdamWFallback,
    ClipChoice,
    FallbackChoice,
    LengthChoice,
    QuadraticModel,
    SGDFallback,
)

__all__ = ["NGDConfig"]


class NGDConfig(Settings):
    """The settings that decide the update of `NGD`.

    The defaults need only `step()` in the training loop. The empirical Fisher shrinks with the loss, so let lr
    fall towards 0 over the run. A loop that can evaluate the loss again takes a third of the steps at batch 4,096 with
    step_length quadratic_model, damping_rule levenberg_marquardt, fisher monte_carlo, damping 0.03 and ema_decay 0.9
    (docs/guides/settings.md, benchmarks/results).

    >>> from ngd_dist.config import EKFAC, ExponentialDamping, NGDConfig
    >>> config = NGDConfig(lr=0.05, preconditioner=EKFAC(), damping_rule=ExponentialDamping(factor=0.5, every=100))
    >>> config.momentum
    0.9
    """

    preconditioner: PreconditionerChoice = Field(
        default=KFAC(), description="The approximation of a layer's Fisher block."
    )
    fisher: FisherChoice = Field(default=Empirical(), description="The source of the gradients in the statistics.")
    statistics_fraction: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Share of the samples of each micro-batch that statistics are made of, evenly spaced and at least "
        "one; gradients are of all samples. The other samples cost nothing here: a sampled or exact Fisher runs the "
        "model on the part first, whenever its statistics are due.",
    )
    staleness: StalenessChoice = Field(default=AdaptiveInterval(), description="When a statistic is refreshed.")
    strategy: StrategyChoice | None = Field(
        default=None, description="None: `single` in one process, `owner_sharded` in several."
    )
    lr: float = Field(
        default=0.1,
        gt=0,
        description="eta: weights move by -lr times the momentum buffer. Take 0.01 under LNGD and layer_wise.",
    )
    momentum: float = Field(
        default=0.9, ge=0, lt=1, description="Buffer = momentum * buffer + direction, as torch's SGD."
    )
    momentum_mode: Literal["correct", "proportional"] = Field(
        default="correct",
        description="correct: momentum stays, and a smaller lr shrinks the past's share of the next step too, as in "
        "SP-NGD's code. proportional: momentum * lr / (first lr), as in its paper ([OT20]).",
    )
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="Decoupled: weights shrink by lr * weight_decay each step; the direction is untouched.",
    )
    weight_rescaling: Literal["off", "always", "shrink"] = Field(
        default="off",
        description="After each step, weights of linear and convolution layers get the norm sqrt(2 outputs): always, "
        "or only if theirs is larger (shrink) ([OT20]).",
    )
    damping: float = Field(
        default=0.1,
        gt=0,
        description="lambda, in units of squared per-sample gradient: the Fisher block is F + lambda I. With the pi "
        "split, sqrt(lambda) is shared between the factors.",
    )
    damping_rule: DampingChoice = Field(default=ConstantDamping(), description="The change of damping over the steps.")
    step_length: LengthChoice | None = Field(default=None, description="None: `layer_wise` under LNGD, else `given`.")
    clip: ClipChoice | None = Field(default=None, description="None: directions are taken as they are.")
    burn_in: int = Field(
        default=0, ge=0, description="First steps, which gather statistics and leave the weights alone."
    )
    fallback: FallbackChoice | None = Field(
        default=None,
        description="The optimizer of the parameters that no preconditioned layer covers. None: `adamw`, or `sgd` "
        "under quadratic_model, which moves every parameter.",
    )
    inversion: InversionChoice = Field(
        default=AutomaticInversion(), description="The method of inverting dense factors."
    )
    inverse_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="Dtype of dense inverses between refreshes. float32: as they were computed. 16 bits halve "
        "their memory, and at worst add to a direction its condition number times 2^-11 (float16) or 2^-8 (bfloat16).",
    )
    max_failed_inversions: int | None = Field(
        default=None,
        ge=0,
        description="Inversions of the whole run, over all ranks, that may fail, the old inverse staying in use. None: "
        "any number. One more, and every rank raises InversionError.",
    )
    ema_decay: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Weight of the past in the moving average of a statistic; 0: the newest batch only.",
    )
    stagger: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Fraction of an interval by which a refresh may come early, so that layers refresh on different "
        "steps; 0 turns staggering off.",
    )
    refresh_cap: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="The share of a refresh of all statistics that one step may do; the most overdue go first, one "
        "layer at least, and the rest waits. None: somewhat more than the mean that the intervals ask for, or no bound "
        "if stagger is 0. First refreshes don't wait.",
    )
    max_dense: int = Field(
        default=8192,
        ge=1,
        description="Factors with more rows than this are kept as their diagonal: wide heads, first layers.",
    )
    exclude: tuple[str, ...] = Field(
        default=(),
        description="Names of modules or layers to leave to the fallback, with all inside them; * matches any text.",
    )
    batch_dim: Literal[0, 1] = Field(
        default=0,
        description="Dimension of the model's inputs, and of its layers' inputs, that counts samples. torch's modules "
        "with batch_first set it themselves.",
    )
    statistics_wire: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="Dtype in which statistics cross the network. In 16 bits a matrix keeps its diagonal in float32, "
        "and the rest is scaled by the diagonal's roots; in two hops each part is scaled by a power of two. float64 "
        "models always send float64.",
    )
    bucket_mb: float = Field(
        default=25.0,
        ge=0,
        description="Size in MiB of the buckets in which statistics leave during the backward pass, over links of "
        "their own. 0: all leave at once, in `step`, over the links of the group.",
    )
    micro_batches: Annotated[int, Field(ge=1)] | Literal["any"] = Field(
        default=1,
        description="Divisor of the mean loss of each backward pass of a step: gradient accumulation. A step may have "
        "fewer passes (the last of an epoch). any: the number of passes that it has, as in Hugging Face's Trainer. "
        "With 1 all passes of a step are parts of one loss on the same samples, as if their sum were differentiated.",
    )
    loss_reduction: Literal["mean", "sum"] = Field(
        default="mean",
        description="Reduction of the loss over the samples of a micro-batch; needed to recover per-sample g.",
    )
    non_finite: Literal["raise", "skip"] = Field(
        default="raise",
        description="Reaction of all ranks together if a gradient is NaN or infinite on any of them. Under a "
        "GradScaler such steps are always skipped.",
    )

    @property
    def length(self) -> LengthChoice:
        """The length of steps, with the default filled in."""
        return self.preconditioner.default_length if self.step_length is None else self.step_length

    @property
    def uncovered(self) -> FallbackChoice:
        """The optimizer of parameters that no layer covers, with the default filled in."""
        if self.fallback is not None:
            return self.fallback
        return SGDFallback() if isinstance(self.length, QuadraticModel) else AdamWFallback()

    @property
    def measures_noise(self) -> bool:
        """Whether the sampling noise of statistics is measured."""
        return self.staleness.measures_noise

    @property
    def needs_objective(self) -> bool:
        """Whether `NGD.step` must be able to evaluate the loss again."""
        return self.length.needs_objective or self.damping_rule.needs_objective

    @property
    def averages_positions(self) -> bool:
        """Whether the loss is a mean over samples and their positions, and its g are taken as a position's own."""
        return self.fisher.positions == "mean" and self.loss_reduction == "mean"

    @property
    def may_keep_rows(self) -> bool:
        """Whether a step's few rows may stand for a dense factor: it is of one batch, its inverse not rounded."""
        adapts_by_error = self.staleness.kind == "adaptive" and self.staleness.criterion == "error"
        is_whole = self.micro_batches == 1 and self.ema_decay == 0
        return is_whole and self.inverse_dtype == "float32" and not adapts_by_error

    @property
    def power_of_positions(self) -> int:
        """The power of a sample's number of positions that second moments of gradients have as a factor.

        A mean over P positions makes each g 1 / P of a position's own, and `capture` multiplies by sqrt(P); the
        gradients of a sampled Fisher carry 1 / sqrt(P).
        """
        if self.fisher.kind != "empirical":
            return -1 if self.fisher.positions == "mean" else 0
        return int(self.averages_positions)

    @property
    def loss_parts(self) -> int:
        """The divisor of a micro-batch's loss, as far as it is known before the end of the step."""
        return 1 if self.micro_batches == "any" else self.micro_batches

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out lr and momentum if the quadratic model chooses them: settings that give them too are refused."""
        content: dict[str, Any] = handler(self)
        unread = {"lr", "momentum"} if isinstance(self.length, QuadraticModel) else set()
        return {name: value for name, value in content.items() if name not in unread}

    @model_validator(mode="after")
    def _choices_agree(self) -> Self:
        """Raises the first refusal of a choice: a setting that it would ignore is an error."""
        chosen = [value for _, value in self if isinstance(value, Choice)]
        # The method comes last: the others have a simpler way out.
        for choice in (self.length, *reversed(chosen)):
            if refusal := choice.refuses(self):
                raise ValueError(refusal)
        return self
