"""LNGD: layer-wise sampling."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ngd_dist.config.methods.base import DEFAULT_THRESHOLD, PreconditionerConfig
from ngd_dist.config.step import LayerWise, LengthChoice

if TYPE_CHECKING:
    from ngd_dist.config.ngd import NGDConfig

__all__ = ["LNGD"]


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
