"""How dense factors are inverted."""

from typing import Annotated, Literal

from pydantic import Field

from ngd_dist.config.choice import Choice

__all__ = ["AutomaticInversion", "CholeskyInversion", "InversionChoice", "NewtonSchulzInversion"]


class AutomaticInversion(Choice):
    """The fastest by a table measured on this kind of device; Cholesky in float32 where there is none, and on CPUs."""

    kind: Literal["automatic"] = "automatic"


class CholeskyInversion(Choice):
    """Cholesky. What fails in float32 is tried in float64."""

    kind: Literal["cholesky"] = "cholesky"
    dtype: Literal["float32", "float64"] = Field(default="float32", description="float64 models always use float64.")


class NewtonSchulzInversion(Choice):
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


InversionChoice = Annotated[AutomaticInversion | CholeskyInversion | NewtonSchulzInversion, Field(discriminator="kind")]
