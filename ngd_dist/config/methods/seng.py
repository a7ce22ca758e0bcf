"""SENG: the empirical Fisher block of each rank's own samples, sketched."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ngd_dist.config.methods.base import DEFAULT_THRESHOLD, PreconditionerConfig

if TYPE_CHECKING:
    from ngd_dist.config.ngd import NGDConfig

__all__ = ["SENG"]


class SENG(PreconditionerConfig):
    """Each rank solves with lambda I + U U^T, U the gradients of its own samples; directions are averaged ([Y22]).

    Statistics don't travel, and directions do, in each step. U is as large as all gradients of a rank's samples: take
    a fixed staleness with hundreds of steps, and statistics_fraction if it does not fit. Two batches have few gradients
    in common, so that an adaptive staleness refreshes in every step.
    """

    kind: Literal["seng"] = "seng"
    method: ClassVar[str] = "ngd_dist.preconditioners.seng:SENG"
    thresholds: ClassVar[Mapping[str, float]] = {"U": DEFAULT_THRESHOLD}
    max_explicit: int = Field(
        default=1_000_000,
        ge=0,
        description="Weights of a layer (of a block, if it has several) up to which a sample's gradient is kept as it "
        "is; of a larger layer, or if samples have one position, as its factors: the input and the output gradient of "
        "each position.",
    )
    r: int | None = Field(
        default=16,
        ge=1,
        description="Rank to which a sample's output gradients are cut by an SVD if it has more positions and its "
        "layer more weights than max_explicit. None: all positions are kept.",
    )
    q: int | None = Field(
        default=256,
        ge=1,
        description="Size of the sketch: q^2 entries of each gradient of a layer up to max_explicit, and those in q "
        "rows and q columns of a larger one, drawn without replacement at each refresh, for the products U^T U and "
        "U^T grad. Layers with fewer entries are exact, and so are those up to max_explicit if samples have one "
        "position. None: all are.",
    )
    scale: Literal["unbiased", "published"] = Field(
        default="unbiased",
        description="Factor on sketched products for d entries of which k are drawn. unbiased: d / k, with which their "
        "mean over draws is the exact product. published: (d / k)^2, as in the authors' code.",
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="With layer, step and rank, decides the drawn entries.")
    product: Literal["exact", "of_sums"] = Field(
        default="exact",
        description="Product U v of a layer above max_explicit. exact: the sum over samples of v g a^T. of_sums: the "
        "product of two weighted sums, of g by sqrt|v| and of a by v / sum sqrt|v|, as in the authors' code: cheaper, "
        "and no identity.",
    )

    @model_validator(mode="after")
    def _sketch_is_read(self) -> Self:
        if self.q is None:
            unread = [name for name in ("scale", "seed") if name in self._chosen()]
            if unread:
                raise ValueError(f"without a sketch nothing is drawn: leave out {unread[0]}, or set q")
        return self

    def refuses(self, config: "NGDConfig") -> str | None:
        if config.ema_decay > 0:
            return (
                f"preconditioner seng has gradients of the newest batch alone: leave out ema_decay {config.ema_decay}"
            )
        if config.inverse_dtype != "float32":
            return f"preconditioner seng inverts no factor of a layer: leave out inverse_dtype {config.inverse_dtype}"
        return None

    def _chosen(self) -> set[str]:
        # A job that was written out and is read again has the defaults too.
        return {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}
