"""Eva: a rank-one Fisher block from the means of inputs and output gradients."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ngd_dist.config.methods.base import DEFAULT_THRESHOLD, SHARING, PreconditionerConfig, Sharing, refuses_inversion

if TYPE_CHECKING:
    from ngd_dist.config.ngd import NGDConfig

__all__ = ["Eva"]


class Eva(PreconditionerConfig):
    """The outer product of two mean vectors, a and g, by the formula of Sherman and Morrison ([Z23]). Damping is exact.

    I + O numbers of a layer are kept and travel, and nothing is inverted. In all directions but one, a step is that of
    SGD with the learning rate lr / damping: take it with a clip, as the source does.
    """

    kind: Literal["eva"] = "eva"
    method: ClassVar[str] = "ngd_dist.preconditioners.eva:Eva"
    thresholds: ClassVar[Mapping[str, float]] = {"a": DEFAULT_THRESHOLD, "g": DEFAULT_THRESHOLD}
    sharing: Sharing = Field(default="expand", description=SHARING)

    def refuses(self, config: "NGDConfig") -> str | None:
        if config.fisher.kind != "empirical":
            return (
                "preconditioner eva reads the mean gradient, which is 0 for labels that the model predicts: leave out "
                f"fisher {config.fisher.kind}"
            )
        return refuses_inversion(self.kind, config)
