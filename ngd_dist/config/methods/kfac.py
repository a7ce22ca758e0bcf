"""K-FAC: Kronecker factors A and G."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ngd_dist.config.methods.base import DEFAULT_THRESHOLD, SHARING, PreconditionerConfig, Sharing, refuses_inversion

if TYPE_CHECKING:
    from ngd_dist.config.ngd import NGDConfig

__all__ = ["KFAC"]


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
        return refuses_inversion(self.kind, config) if self.damping_form == "exact" else None

    def refuses_batches(self, replicates: int) -> str | None:
        if self.rows is None or self.rows >= replicates:
            return None
        return f"rows must be at least {replicates}, one for each micro-batch of each rank, got {self.rows}; raise it"
