"""The approximation of a layer's Fisher block: the methods of this package, and the base of others.

A method of another package is a subclass of `PreconditionerConfig`; see docs/extending.md.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, SerializeAsAny, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from ngd_dist.config.choice import Choice
from ngd_dist.config.step import GivenLength, LayerWise, LengthChoice

if TYPE_CHECKING:
    from ngd_dist.config.ngd import NGDConfig

__all__ = [
    "DEFAULT_THRESHOLD",
    "EKFAC",
    "KFAC",
    "LNGD",
    "PRECONDITIONERS",
    "PreconditionerChoice",
    "PreconditionerConfig",
    "Sharing",
]

# The threshold of a statistic, unless its method or the schedule sets another.
DEFAULT_THRESHOLD = 0.1

# The class of each kind. A subclass of `PreconditionerConfig` is entered as it is defined.
PRECONDITIONERS: "dict[str, type[PreconditionerConfig]]" = {}


class PreconditionerConfig(Choice):
    """Base of the settings of a method. Defining a subclass registers it; docs/extending.md has an example.

    A subclass gives two things. `kind: Literal["mine"] = "mine"`: its name in files. `method`: the class that carries
    it out, as "package.module:Class", so that the settings import no torch; the class is a `Preconditioner`, built as
    `Class(shape, config, max_dense)` for each layer.

    `thresholds`: by statistic of the method, the relative change below which values count as similar, unless the
    schedule sets another. `default_length`: the length of steps if `NGDConfig.step_length` is None.
    `takes_one_hot_inputs`: whether the method takes layers with one-hot inputs (embeddings); if not, K-FAC does.

    Raises: TypeError, if a subclass is defined without `kind` or `method`, or with a `kind` of this package.
    """

    method: ClassVar[str]
    thresholds: ClassVar[Mapping[str, float]] = {}
    default_length: ClassVar[LengthChoice] = GivenLength()
    takes_one_hot_inputs: ClassVar[bool] = False

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        kind = cls.model_fields["kind"].default
        if not isinstance(kind, str):
            raise TypeError(f'{cls.__name__} needs a kind with a default, as `kind: Literal["mine"] = "mine"`')
        if ":" not in getattr(cls, "method", ""):
            raise TypeError(f'{cls.__name__} needs method, the class that carries it out, as "package.module:Class"')
        taken = PRECONDITIONERS.get(kind)
        if taken is not None and taken.__module__ == __name__:
            raise TypeError(f"{cls.__name__} needs a kind of its own: {kind} is that of {taken.__name__}")
        PRECONDITIONERS[kind] = cls

    def refuses_batches(self, replicates: int) -> str | None:
        """Returns the reason why a step can't have `replicates` micro-batches, those of all ranks together, or None."""
        return None


Sharing = Literal["expand", "reduce"]
SHARING = (
    "Treatment of a weight used at several positions of a sample (pixels, tokens). expand: each position counts as a "
    "sample; reduce: inputs are averaged and gradients summed over positions first, which is right if the positions "
    "are pooled into one prediction ([E23])."
)


class KFAC(PreconditionerConfig):
    """Kronecker factors A and G per layer ([MG15])."""

    kind: Literal["kfac"] = "kfac"
    method: ClassVar[str] = "ngd_dist.preconditioners.kfac:KFAC"
    thresholds: ClassVar[Mapping[str, float]] = {"A": DEFAULT_THRESHOLD, "G": DEFAULT_THRESHOLD}
    takes_one_hot_inputs: ClassVar[bool] = True
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
        "is applied by Woodbury's identity. Fewer rows are cheaper to refresh and to apply. None: matrices.",
    )

    @model_validator(mode="after")
    def _rows_have_no_eigenbasis(self) -> Self:
        if self.rows is not None and self.damping_form == "exact":
            raise ValueError("rows are inverted by Woodbury's identity: leave out damping_form exact, or rows")
        return self

    def refuses(self, config: "NGDConfig") -> str | None:
        if self.rows is not None:
            if config.ema_decay > 0:
                return f"rows are of the newest batch alone: leave out ema_decay {config.ema_decay}, or rows"
            if not config.fisher.takes_one_pass:
                return "rows are of one backward pass: leave them out, or take fisher with one sample"
            if config.micro_batches == "any":
                return (
                    "rows are shared out among the micro-batches: set micro_batches to their number, or leave out rows"
                )
        return _refuses_inversion(self.kind, config) if self.damping_form == "exact" else None

    def refuses_batches(self, replicates: int) -> str | None:
        if self.rows is None or self.rows >= replicates:
            return None
        return f"rows must be at least {replicates}, one for each micro-batch of each rank, got {self.rows}; raise it"


class EKFAC(PreconditionerConfig):
    """Per-entry second moments in the eigenbasis of K-FAC's factors ([GLB18]). Damping is exact."""

    kind: Literal["ekfac"] = "ekfac"
    method: ClassVar[str] = "ngd_dist.preconditioners.ekfac:EKFAC"
    thresholds: ClassVar[Mapping[str, float]] = {**KFAC.thresholds, "S": DEFAULT_THRESHOLD}
    sharing: Sharing = Field(default="expand", description=SHARING)

    def refuses(self, config: "NGDConfig") -> str | None:
        return _refuses_inversion(self.kind, config)


class LNGD(PreconditionerConfig):
    """Layer-wise sampling: one dense factor, one diagonal one, both from the forward pass alone ([L24]).

    It chooses its damping: the mean eigenvalue of each factor, kept within bounds. NGDConfig.damping is then that of
    the other kinds of layer (normalisation, embedding).
    """

    kind: Literal["lngd"] = "lngd"
    method: ClassVar[str] = "ngd_dist.preconditioners.lngd:LNGD"
    thresholds: ClassVar[Mapping[str, float]] = {"Phi": DEFAULT_THRESHOLD, "Psi": DEFAULT_THRESHOLD}
    default_length: ClassVar[LengthChoice] = LayerWise()
    min_damping: float = Field(default=1e-5, gt=0, description="nu_1: the smallest damping of a factor.")
    max_damping: float = Field(
        default=1e-2, gt=0, description="nu_2: the largest damping of a factor, unless its rounding needs more."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_damping > self.max_damping:
            raise ValueError(f"min_damping must be <= max_damping, got {self.min_damping} and {self.max_damping}")
        return self

    def refuses(self, config: "NGDConfig") -> str | None:
        if config.damping_rule.kind != "constant":
            return f"preconditioner lngd has its own damping: leave out damping_rule {config.damping_rule.kind}"
        if config.fisher.kind != "empirical":
            return f"preconditioner lngd reads no output gradients: leave out fisher {config.fisher.kind}"
        return None


def _refuses_inversion(kind: str, config: "NGDConfig") -> str | None:
    """Returns the contradiction between a method that inverts nothing and settings of inversion, or None."""
    unread = [] if config.inversion.kind == "automatic" else [f"inversion {config.inversion.kind}"]
    unread += [] if config.inverse_dtype == "float32" else [f"inverse_dtype {config.inverse_dtype}"]
    return f"preconditioner {kind} decomposes its factors and inverts none: leave out {unread[0]}" if unread else None


def _or_registered(given: object, validate: ValidatorFunctionWrapHandler) -> object:
    """Returns an instance of any method's class as it is, and the class of another package for its kind."""
    if isinstance(given, PreconditionerConfig):
        return given
    kind = given.get("kind") if isinstance(given, Mapping) else None
    choice = PRECONDITIONERS.get(kind) if isinstance(kind, str) else None
    if choice is None or choice.__module__ == __name__:
        return validate(given)
    return choice.model_validate(given)


if TYPE_CHECKING:
    PreconditionerChoice = PreconditionerConfig
else:
    # Its JSON schema is that of the methods of this package: the ones that a job may name.
    PreconditionerChoice = Annotated[
        KFAC | EKFAC | LNGD, Field(discriminator="kind"), WrapValidator(_or_registered), SerializeAsAny()
    ]
