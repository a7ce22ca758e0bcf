"""The base of the settings of a method, and the registry of all that are defined.

A method of another package is a subclass of `PreconditionerConfig`; see docs/extending.md.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ngd_dist.config.choice import Choice
from ngd_dist.config.step import GivenLength, LengthChoice

if TYPE_CHECKING:
    from ngd_dist.config.ngd import NGDConfig

__all__ = [
    "DEFAULT_THRESHOLD",
    "PRECONDITIONERS",
    "SHARING",
    "PreconditionerConfig",
    "Sharing",
    "is_ours",
    "refuses_inversion",
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
        if taken is not None and is_ours(taken):
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


def is_ours(method: "type[PreconditionerConfig]") -> bool:
    """Returns whether the class is of this package: one that a job may name."""
    return method.__module__.startswith(f"{__package__}.")


def refuses_inversion(kind: str, config: "NGDConfig") -> str | None:
    """Returns the contradiction between a method that inverts nothing and settings of inversion, or None."""
    unread = [] if config.inversion.kind == "automatic" else [f"inversion {config.inversion.kind}"]
    unread += [] if config.inverse_dtype == "float32" else [f"inverse_dtype {config.inverse_dtype}"]
    return f"preconditioner {kind} inverts no factor: leave out {unread[0]}" if unread else None
