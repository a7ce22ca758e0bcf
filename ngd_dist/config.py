"""All mathematical settings of the optimizer, as frozen pydantic models. Imports without torch.

Each choice is its own class, told apart by ``kind``; an unknown field is an error, never ignored.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "EKFAC",
    "KFAC",
    "LNGD",
    "AdamWFallback",
    "AdaptiveInterval",
    "AllReduce",
    "AutomaticInversion",
    "Bernoulli",
    "Categorical",
    "CholeskyInversion",
    "ConstantDamping",
    "Empirical",
    "Exact",
    "ExponentialDamping",
    "FixedInterval",
    "Gaussian",
    "GivenLength",
    "InversionChoice",
    "KLClip",
    "LayerWise",
    "LevenbergMarquardt",
    "MonteCarlo",
    "NGDConfig",
    "NewtonSchulzInversion",
    "NormClip",
    "OwnerSharded",
    "PolynomialDamping",
    "QuadraticModel",
    "SGDFallback",
    "Settings",
    "Single",
    "Thresholds",
]


class Settings(BaseModel):
    """Base of every configuration class: frozen, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# --- preconditioner: the approximation of a layer's Fisher block ----------------------------------------------------

Sharing = Literal["expand", "reduce"]
SHARING = (
    "How a weight used at several positions of a sample (pixels, tokens) is treated. expand: each position counts as a "
    "sample; reduce: inputs are averaged and gradients summed over positions first, which is right where the positions "
    "are pooled into one prediction ([E23])."
)


class KFAC(Settings):
    """Kronecker factors A and G per layer ([MG15])."""

    kind: Literal["kfac"] = "kfac"
    sharing: Sharing = Field(default="expand", description=SHARING)
    damping_form: Literal["pi", "exact"] = Field(
        default="pi",
        description="pi: multiples of I are added to A and to G, and both inverted by Cholesky ([MG15] 6.3). exact: "
        "lambda is added to the eigenvalues of their product; the direction is (A (x) G + lambda I)^-1 grad, for an "
        "eigendecomposition at each refresh and twice the work at each step.",
    )
    rows: int | None = Field(
        default=None,
        ge=2,
        description="A factor at least twice as wide as this is kept as this many rows of the batch, of all ranks and "
        "micro-batches together, drawn without replacement (all of a smaller batch, and then it is exact); its inverse "
        "is applied by Woodbury's identity. Cheaper to refresh and to apply the fewer they are. None: matrices.",
    )

    @model_validator(mode="after")
    def _rows_have_no_eigenbasis(self) -> Self:
        if self.rows is not None and self.damping_form == "exact":
            raise ValueError("rows are inverted by Woodbury's identity: leave out damping_form exact, or rows")
        return self


class EKFAC(Settings):
    """Per-entry second moments in the eigenbasis of K-FAC's factors ([GLB18]). Damping is exact."""

    kind: Literal["ekfac"] = "ekfac"
    sharing: Sharing = Field(default="expand", description=SHARING)


class LNGD(Settings):
    """Layer-wise sampling: one dense factor, one diagonal one, both from the forward pass alone ([L24]).

    Its damping is its own: the mean eigenvalue of each factor, kept within bounds. NGDConfig.damping is then that of
    the other kinds of layer (normalisation, embedding).
    """

    kind: Literal["lngd"] = "lngd"
    min_damping: float = Field(default=1e-5, gt=0, description="nu_1: the least that is added to a factor.")
    max_damping: float = Field(
        default=1e-2, gt=0, description="nu_2: the most that is added to a factor, unless its rounding needs more."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_damping > self.max_damping:
            raise ValueError(f"min_damping must be <= max_damping, got {self.min_damping} and {self.max_damping}")
        return self


# --- Fisher: whose gradients the statistics are made of ---------------------------------------------------------------


class Categorical(Settings):
    """The model's output are logits of one class: softmax with cross-entropy."""

    kind: Literal["categorical"] = "categorical"
    class_dim: int = Field(
        default=-1, description="Dimension of the output that runs over classes; 1 for [N, C, H, W]."
    )


class Bernoulli(Settings):
    """Each output is the logit of one independent event: binary cross-entropy with logits."""

    kind: Literal["bernoulli"] = "bernoulli"


class Gaussian(Settings):
    """The output is the mean of a normal distribution: squared error / (2 variance), summed over a sample's outputs."""

    kind: Literal["gaussian"] = "gaussian"
    variance: float = Field(
        default=1.0,
        gt=0,
        description="1/2 for the plain squared error; outputs / 2 for torch's mse_loss, which averages them.",
    )


LikelihoodChoice = Annotated[Categorical | Bernoulli | Gaussian, Field(discriminator="kind")]
Positions = Literal["mean", "sum"]
POSITIONS = "How a sample's loss reduces over its positions (tokens, pixels), if its output has any."


class Empirical(Settings):
    """The gradients of the training loss: no further backward pass. Vanishes as the loss does."""

    kind: Literal["empirical"] = "empirical"
    positions: Positions = Field(
        default="sum",
        description="sum: damping is in units of the square of a sample's own gradient, which falls with the positions "
        "(tokens, pixels) that its loss is a mean over. mean: of a position's own, as under the other Fishers: damping "
        "then means the same at any number of positions.",
    )
    class_dim: int = Field(
        default=-1, description="Dimension of the output that runs over classes; 1 for [N, C, H, W]."
    )


class MonteCarlo(Settings):
    """Gradients for labels drawn from the model's own prediction: one more backward pass per sample, when due."""

    kind: Literal["monte_carlo"] = "monte_carlo"
    likelihood: LikelihoodChoice = Field(
        default=Categorical(), description="What the model's output says about a label."
    )
    positions: Positions = Field(default="mean", description=POSITIONS)
    samples: int = Field(default=1, ge=1, le=100, description="Labels drawn per prediction.")
    seed: int = Field(default=0, ge=0, lt=2**31, description="With step and rank, decides what is drawn.")


class Exact(Settings):
    """Type-2: the expectation over all labels, by one backward pass per output of a sample. For small outputs."""

    kind: Literal["exact"] = "exact"
    likelihood: LikelihoodChoice = Field(
        default=Categorical(), description="What the model's output says about a label."
    )
    positions: Positions = Field(default="mean", description=POSITIONS)
    max_outputs: int = Field(
        default=128, ge=1, description="Outputs per sample, and so backward passes, that are accepted."
    )


# --- staleness --------------------------------------------------------------------------------------------------------


class Thresholds(Settings):
    """||X - Y|| / min(||X||, ||Y||) below which values of a statistic count as similar, if its noise is no larger."""

    A: float = Field(default=0.1, gt=0, description="K-FAC, EKFAC: second moment of layer inputs.")
    G: float = Field(default=0.1, gt=0, description="K-FAC, EKFAC: second moment of output gradients.")
    S: float = Field(default=0.1, gt=0, description="EKFAC: second moments in the eigenbasis.")
    Phi: float = Field(default=0.1, gt=0, description="LNGD: weighted second moment of layer inputs.")
    Psi: float = Field(default=0.1, gt=0, description="LNGD: weighted second moments of outputs.")
    F: float = Field(default=0.1, gt=0, description="Unit-wise Fisher blocks of normalisation layers.")


class AdaptiveInterval(Settings):
    """SP-NGD's stale statistics: a statistic's interval grows while it stays similar ([OT20])."""

    kind: Literal["adaptive"] = "adaptive"
    thresholds: Thresholds = Field(default=Thresholds(), description="By statistic.")
    noise_margin: float = Field(
        default=1.5,
        ge=0,
        description="A threshold is at least this times the sampling noise that is measured of the change, sqrt(2) "
        "times that of one batch without ema_decay, but at most 1. 0: thresholds are fixed, and a statistic whose "
        "noise is above them is refreshed in every step.",
    )
    criterion: Literal["change", "error"] = Field(
        default="change",
        description="What makes a statistic count as changed. change: its own relative change. error: how far the "
        "inverse in use is from that of the new value, ||I - (X + damping) inverse|| / sqrt(n), or how far a basis of "
        "EKFAC is from diagonalising it; below error_threshold the old one stays in use and nothing is inverted. What "
        "has neither follows its change: normalisation layers, exact damping, factors kept as rows.",
    )
    error_threshold: float = Field(
        default=0.25,
        gt=0,
        lt=1,
        description="With criterion error. From half of it on an interval grows no more, from all of it on it is "
        "halved and the inverse made anew.",
    )
    max_interval: int = Field(default=1000, ge=1, description="Steps; no longer interval is planned for a statistic.")

    @model_validator(mode="after")
    def _threshold_is_read(self) -> Self:
        # A job that was written out and is read again says the default too.
        is_chosen = self.error_threshold != type(self).model_fields["error_threshold"].default
        if self.criterion == "change" and is_chosen:
            raise ValueError("criterion change measures no error: leave out error_threshold, or say criterion error")
        return self


class FixedInterval(Settings):
    """Every statistic is refreshed once in `steps` optimizer steps; under EKFAC a basis lasts for two at least."""

    kind: Literal["fixed"] = "fixed"
    steps: int = Field(default=1, ge=1, description="Optimizer steps between two refreshes of one statistic.")


# --- strategy ---------------------------------------------------------------------------------------------------------


class Single(Settings):
    """One process; nothing travels."""

    kind: Literal["single"] = "single"


class AllReduce(Settings):
    """Statistics and gradients are averaged on all ranks; each rank inverts and preconditions every layer."""

    kind: Literal["all_reduce"] = "all_reduce"


class OwnerSharded(Settings):
    """Statistics are reduced to the layer's owner, which inverts; those that hold the layer precondition its gradient.

    What several ranks hold costs memory and work on each, and the inverses travel to them on each refresh; for that
    its directions go to fewer ranks in every step, to none at fraction 1.
    """

    kind: Literal["owner_sharded"] = "owner_sharded"
    fraction: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the ranks that hold a layer's inverses. 0: its owner alone; 1: all.",
    )
    replicate_below: int = Field(
        default=1_000_000,
        ge=0,
        description="A layer whose refresh takes fewer floating-point operations is refreshed and held by all ranks: "
        "normalisation layers, factors of up to some 60 rows. Its statistics are summed along with the gradients.",
    )


# --- inversion of dense factors ---------------------------------------------------------------------------------------


class AutomaticInversion(Settings):
    """The fastest by a table measured on this kind of device; Cholesky in float32 where there is none, and on CPUs."""

    kind: Literal["automatic"] = "automatic"


class CholeskyInversion(Settings):
    """Cholesky. What fails in float32 is tried in float64."""

    kind: Literal["cholesky"] = "cholesky"
    dtype: Literal["float32", "float64"] = Field(default="float32", description="float64 models always use float64.")


class NewtonSchulzInversion(Settings):
    """X <- X + X (I - A X), from the inverse in use where that is close; Cholesky where it would not converge."""

    kind: Literal["newton_schulz"] = "newton_schulz"
    update_dtype: Literal["float16", "bfloat16", "float32"] = Field(
        default="float16", description="To which the operands of X (I - A X) are rounded; sums are float32."
    )
    residual: Literal["float32", "split"] = Field(
        default="split",
        description="How I - A X is computed: in float32, TF32 off; or by three products of numbers split into two "
        "float16, as accurate up to a condition number of 1e4.",
    )
    max_iterations: int = Field(
        default=20, ge=1, le=40, description="Factors that are expected to need more are inverted by Cholesky."
    )
    tolerance: float = Field(
        default=1e-3, gt=0, le=0.05, description="Spectral norm of I - A X that the iteration is run down to."
    )


# --- damping over time ------------------------------------------------------------------------------------------------


class ConstantDamping(Settings):
    """The damping of each param group, until somebody sets another."""

    kind: Literal["constant"] = "constant"


class ExponentialDamping(Settings):
    """damping * factor ** (step / every), never below `minimum`."""

    kind: Literal["exponential"] = "exponential"
    factor: float = Field(gt=0, le=1, description="What damping is multiplied by over `every` steps.")
    every: int = Field(default=1, ge=1, description="Optimizer steps.")
    minimum: float = Field(default=1e-8, gt=0, description="Damping never falls below.")


class PolynomialDamping(Settings):
    """From damping to `end` over `steps` steps: end + (damping - end) * (1 - step / steps) ** power; then `end`."""

    kind: Literal["polynomial"] = "polynomial"
    end: float = Field(gt=0, description="Damping from step `steps` on.")
    steps: int = Field(ge=1, description="Optimizer steps.")
    power: float = Field(default=1.0, gt=0, description="1: a straight line.")


class LevenbergMarquardt(Settings):
    """Damping follows how well the quadratic model predicted the loss ([MG15] 6.5). `NGD.step` needs an objective.

    rho = (change of the loss) / (change of the model); above `high` damping is multiplied by decay ** every, below
    `low` divided by it.
    """

    kind: Literal["levenberg_marquardt"] = "levenberg_marquardt"
    decay: float = Field(
        default=0.95,
        gt=0,
        lt=1,
        description="omega, per step ([MG15]). 0.9 threw a run on mini-batches of digits far off.",
    )
    every: int = Field(default=5, ge=1, description="Optimizer steps between two adaptations.")
    low: float = Field(default=0.25, gt=0, lt=1, description="rho below which damping rises.")
    high: float = Field(default=0.75, gt=0, lt=1, description="rho above which damping falls.")
    minimum: float = Field(default=1e-5, gt=0, description="Damping never falls below.")
    maximum: float = Field(default=1e4, gt=0, description="Damping never rises above.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low must be < high, got {self.low} and {self.high}")
        if self.minimum >= self.maximum:
            raise ValueError(f"minimum must be < maximum, got {self.minimum} and {self.maximum}")
        return self


# --- length of a step, clipping ---------------------------------------------------------------------------------------


class GivenLength(Settings):
    """Each param group's lr and momentum."""

    kind: Literal["given"] = "given"


class LayerWise(Settings):
    """lr times a factor per layer: d^T grad / (d^T F d + mu), F the empirical Fisher ([L24] eq. 12-13).

    A layer is then predicted to lower the loss by at most lr in a step, so take a smaller one: 0.01, say. Keeps the
    inputs and output gradients of every layer until the step.
    """

    kind: Literal["layer_wise"] = "layer_wise"
    mu: float = Field(default=1e-8, gt=0, description="Keeps the quotient finite; squared gradient units.")


class QuadraticModel(Settings):
    """lr and momentum that minimise the exact quadratic model of the loss in the plane of the direction and the last
    step ([MG15] 7). `NGD.step` needs an objective; each param group's lr and momentum are set to what was chosen.
    """

    kind: Literal["quadratic_model"] = "quadratic_model"


class KLClip(Settings):
    """Preconditioned layers' directions are scaled so that lr^2 d^T F d, twice the step's KL divergence, is bounded.

    d^T F d is taken to be <d, gradient>, as it is for d = F^-1 gradient; damping makes it less.
    """

    kind: Literal["kl"] = "kl"
    max_kl: float = Field(default=1e-3, gt=0, description="Bound on the sum over preconditioned layers.")


class NormClip(Settings):
    """Preconditioned layers' directions are scaled so that their norm as one vector stays bounded."""

    kind: Literal["norm"] = "norm"
    max_norm: float = Field(default=1.0, gt=0, description="Bound on the norm.")


# --- parameters outside any covered layer -----------------------------------------------------------------------------


class SGDFallback(Settings):
    """The gradient takes the direction's place: lr, momentum and weight decay are the param group's."""

    kind: Literal["sgd"] = "sgd"


class AdamWFallback(Settings):
    """torch.optim.AdamW. Its lr falls and rises in proportion with the param group's lr; weight decay is its own."""

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(default=1e-3, gt=0, description="Where the param group's lr is the one that it began with.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Of the mean of gradients.")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="Of the mean of their squares.")
    eps: float = Field(default=1e-8, gt=0, description="Added to the root of that mean.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled, at the fallback's own lr.")


PreconditionerChoice = Annotated[KFAC | EKFAC | LNGD, Field(discriminator="kind")]
FisherChoice = Annotated[Empirical | MonteCarlo | Exact, Field(discriminator="kind")]
StalenessChoice = Annotated[AdaptiveInterval | FixedInterval, Field(discriminator="kind")]
StrategyChoice = Annotated[Single | AllReduce | OwnerSharded, Field(discriminator="kind")]
DampingChoice = Annotated[
    ConstantDamping | ExponentialDamping | PolynomialDamping | LevenbergMarquardt, Field(discriminator="kind")
]
InversionChoice = Annotated[AutomaticInversion | CholeskyInversion | NewtonSchulzInversion, Field(discriminator="kind")]
LengthChoice = Annotated[GivenLength | LayerWise | QuadraticModel, Field(discriminator="kind")]
ClipChoice = Annotated[KLClip | NormClip, Field(discriminator="kind")]
FallbackChoice = Annotated[SGDFallback | AdamWFallback, Field(discriminator="kind")]


class NGDConfig(Settings):
    """Everything that decides the update of `NGD`.

    The defaults ask nothing of the training loop but `step()`. The empirical Fisher shrinks with the loss, so let lr
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
    fisher: FisherChoice = Field(default=Empirical(), description="Whose gradients the statistics are made of.")
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
        "or only where theirs is larger (shrink) ([OT20]).",
    )
    damping: float = Field(
        default=0.1,
        gt=0,
        description="lambda, in units of squared per-sample gradient: the Fisher block is F + lambda I. With the pi "
        "split, sqrt(lambda) is shared between the factors.",
    )
    damping_rule: DampingChoice = Field(default=ConstantDamping(), description="How damping changes over the steps.")
    step_length: LengthChoice | None = Field(default=None, description="None: `layer_wise` under LNGD, else `given`.")
    clip: ClipChoice | None = Field(default=None, description="None: directions are taken as they are.")
    burn_in: int = Field(
        default=0, ge=0, description="First steps, which gather statistics and leave the weights alone."
    )
    fallback: FallbackChoice = Field(
        default=SGDFallback(), description="What updates the parameters that no preconditioned layer covers."
    )
    inversion: InversionChoice = Field(default=AutomaticInversion(), description="How dense factors are inverted.")
    inverse_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="What dense inverses are kept in between refreshes. float32: as they were computed. 16 bits halve "
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
        description="The share of a refresh of all statistics that one step may do; what is most overdue goes first, "
        "one layer at least, and the rest waits. None: somewhat more than the mean that the intervals ask for, or no "
        "bound where stagger is 0. First refreshes don't wait.",
    )
    max_dense: int = Field(
        default=8192,
        ge=1,
        description="Factors with more rows than this are kept as their diagonal: wide heads, first layers.",
    )
    exclude: tuple[str, ...] = Field(
        default=(),
        description="Names of modules or layers to leave to the fallback, with all inside them; * stands for anything.",
    )
    batch_dim: Literal[0, 1] = Field(
        default=0,
        description="Dimension of the model's inputs, and of what its layers read, that counts samples. torch's "
        "modules with batch_first say so themselves.",
    )
    statistics_wire: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="Dtype in which statistics cross the network. In 16 bits a matrix keeps its diagonal in float32, "
        "and the rest is scaled by the diagonal's roots; float64 models always send float64.",
    )
    bucket_mb: float = Field(
        default=25.0,
        ge=0,
        description="Statistics leave during the backward pass, in buckets of so many MiB, over links of their own. "
        "0: all at once, in `step`, over those of the group.",
    )
    micro_batches: Annotated[int, Field(ge=1)] | Literal["any"] = Field(
        default=1,
        description="What the mean loss of each backward pass of a step is divided by: gradient accumulation. A step "
        "may have fewer passes (the last of an epoch). any: by as many as it has, as in Hugging Face's Trainer. "
        "With 1 all passes of a step are parts of one loss on the same samples, as if their sum were differentiated.",
    )
    loss_reduction: Literal["mean", "sum"] = Field(
        default="mean",
        description="How the loss reduces over the samples of a micro-batch; needed to recover per-sample g.",
    )
    non_finite: Literal["raise", "skip"] = Field(
        default="raise",
        description="What all ranks do together with a gradient that is NaN or infinite on any of them. Under a "
        "GradScaler such steps are always skipped.",
    )

    @property
    def length(self) -> GivenLength | LayerWise | QuadraticModel:
        """How long steps are, after the default is settled."""
        if self.step_length is not None:
            return self.step_length
        return LayerWise() if isinstance(self.preconditioner, LNGD) else GivenLength()

    @property
    def measures_noise(self) -> bool:
        """Whether the sampling noise of statistics is asked for."""
        return isinstance(self.staleness, AdaptiveInterval) and self.staleness.noise_margin > 0

    @property
    def needs_objective(self) -> bool:
        """Whether `NGD.step` must be able to evaluate the loss again."""
        return isinstance(self.length, QuadraticModel) or isinstance(self.damping_rule, LevenbergMarquardt)

    @property
    def loss_parts(self) -> int:
        """What the loss of a micro-batch is known to be divided by before the step is over."""
        return 1 if self.micro_batches == "any" else self.micro_batches

    @property
    def _decomposes(self) -> bool:
        chosen = self.preconditioner
        return isinstance(chosen, EKFAC) or (isinstance(chosen, KFAC) and chosen.damping_form == "exact")

    @model_validator(mode="after")
    def _settings_are_read(self) -> Self:
        """Refuses what another setting would make be ignored."""
        if isinstance(self.length, QuadraticModel):
            chosen = {"lr", "momentum"} & self.model_fields_set
            if chosen:
                raise ValueError(f"step_length quadratic_model chooses lr and momentum: leave out {sorted(chosen)}")
            if self.clip is not None:
                raise ValueError(f"step_length quadratic_model chooses the length: leave out clip {self.clip.kind}")
            if self.weight_decay > 0 or self.weight_rescaling != "off":
                raise ValueError(
                    "step_length quadratic_model predicts the whole step: leave out weight_decay and weight_rescaling"
                )
            if isinstance(self.fallback, AdamWFallback):
                raise ValueError("step_length quadratic_model moves every parameter: leave out fallback adamw")
            if self.momentum_mode != "correct":
                raise ValueError("step_length quadratic_model chooses momentum: leave out momentum_mode")
        cap, staleness = self.refresh_cap, self.staleness
        if cap is not None and isinstance(staleness, FixedInterval) and cap * staleness.steps < 1:
            raise ValueError(
                f"staleness fixed with steps {staleness.steps} refreshes 1/{staleness.steps} of all statistics in a "
                f"step: refresh_cap must be at least that, got {cap}"
            )
        if self.batch_dim != 0 and not isinstance(self.fisher, Empirical):
            raise ValueError(
                f"fisher {self.fisher.kind} counts samples by dimension 0 of the output: leave out batch_dim, or fisher"
            )
        if isinstance(self.preconditioner, KFAC) and self.preconditioner.rows is not None:
            if self.ema_decay > 0:
                raise ValueError(f"rows are of the newest batch alone: leave out ema_decay {self.ema_decay}, or rows")
            if isinstance(self.fisher, Exact) or (isinstance(self.fisher, MonteCarlo) and self.fisher.samples > 1):
                raise ValueError("rows are of one backward pass: leave them out, or take fisher with one sample")
            if self.micro_batches == "any":
                raise ValueError(
                    "rows are shared out among the micro-batches: set micro_batches to their number, or leave out rows"
                )
        if self._decomposes:
            unread = [] if isinstance(self.inversion, AutomaticInversion) else [f"inversion {self.inversion.kind}"]
            unread += [] if self.inverse_dtype == "float32" else [f"inverse_dtype {self.inverse_dtype}"]
            if unread:
                kind = self.preconditioner.kind
                raise ValueError(
                    f"preconditioner {kind} decomposes its factors and inverts none: leave out {unread[0]}"
                )
        if isinstance(self.preconditioner, LNGD):
            if not isinstance(self.damping_rule, ConstantDamping):
                raise ValueError(
                    f"preconditioner lngd has its own damping: leave out damping_rule {self.damping_rule.kind}"
                )
            if not isinstance(self.fisher, Empirical):
                raise ValueError(f"preconditioner lngd reads no output gradients: leave out fisher {self.fisher.kind}")
        return self
