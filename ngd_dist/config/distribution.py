"""The ranks on which a layer's statistics, inverses and directions are made."""

from typing import Annotated, Literal

from pydantic import Field

from ngd_dist.config.choice import Choice

__all__ = ["AllReduce", "OwnerSharded", "Single", "StrategyChoice"]


class Single(Choice):
    """One process; nothing travels."""

    kind: Literal["single"] = "single"


class AllReduce(Choice):
    """Statistics and gradients are averaged on all ranks; each rank inverts and preconditions every layer."""

    kind: Literal["all_reduce"] = "all_reduce"


class OwnerSharded(Choice):
    """Statistics are reduced to the layer's owner, which inverts; ranks that hold the layer precondition its gradient.

    If several ranks hold a layer, it costs memory and work on each, and the inverses travel to them on each refresh. In
    return its directions go to fewer ranks in every step, at fraction 1 to none.
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


StrategyChoice = Annotated[Single | AllReduce | OwnerSharded, Field(discriminator="kind")]
