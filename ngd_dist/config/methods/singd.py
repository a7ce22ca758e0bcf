"""SINGD: structured roots of the inverse factors, which are learnt and never inverted."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ngd_dist.config.methods.base import SHARING, PreconditionerConfig, Sharing, refuses_inversion
from ngd_dist.config.methods.kfac import KFAC

if TYPE_CHECKING:
    from ngd_dist.config.ngd import NGDConfig

__all__ = ["SINGD"]

# The widths of the source's structures: blocks of 30 rows, 15 rows of a hierarchical matrix.
WIDTHS = {"block_diagonal": 30, "low_rank": 15}


class SINGD(PreconditionerConfig):
    """Roots K and C with K K^T near A^-1 and C C^T near G^-1, moved by products at each refresh ([L23]).

    A refresh is one step of the roots: rare refreshes leave them behind.
    """

    kind: Literal["singd"] = "singd"
    method: ClassVar[str] = "ngd_dist.preconditioners.singd:SINGD"
    thresholds: ClassVar[Mapping[str, float]] = KFAC.thresholds
    sharing: Sharing = Field(default="expand", description=SHARING)
    structure: Literal["dense", "block_diagonal", "diagonal", "low_rank"] = Field(
        default="dense",
        description="The entries of K and C that may differ from 0, and with them the part of A and G that is measured "
        "and travels. low_rank: `width` rows of an upper triangle over a diagonal, so that K K^T is a diagonal and a "
        "matrix of that rank.",
    )
    width: int | None = Field(
        default=None,
        ge=1,
        description="The rows of a block of block_diagonal, or the rank of low_rank. None: 30 and 15.",
    )
    rate: float = Field(
        default=0.3,
        gt=0,
        lt=1,
        description="beta_1: the length of a step of K and C, less where it could change the sign of a root. 0.3 "
        "follows the statistics as an ema_decay of 0.7 does. The source's 0.01 is for steps with a small lr: if "
        "weights move faster than roots, training diverges.",
    )
    momentum: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="alpha_1: weight of the past in the steps of K and C. 0: they have no past.",
    )
    kfac_like: bool = Field(
        default=False,
        description="Whether K and C follow A and G apart, each with its share of the damping as in K-FAC. If not, the "
        "damping is that of the product of both, and the step of each has the trace of the other.",
    )

    @property
    def rows(self) -> int | None:
        """The rows of a block, or the rank; None for structures that have neither."""
        return WIDTHS.get(self.structure) if self.width is None else self.width

    @model_validator(mode="after")
    def _width_is_read(self) -> Self:
        if self.width is not None and self.structure not in WIDTHS:
            raise ValueError(f"structure {self.structure} has no width: leave out width {self.width}, or the structure")
        return self

    def refuses(self, config: "NGDConfig") -> str | None:
        return refuses_inversion(self.kind, config)
