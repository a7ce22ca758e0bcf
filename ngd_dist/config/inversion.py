"""The methods of inverting dense factors."""

from typing import Annotated, Literal

from pydantic import Field

from ngd_dist.config.choice import Choice

__all__ = ["AutomaticInversion", "CholeskyInversion", "InversionChoice", "NewtonSchulzInversion"]


class AutomaticInversion(Choice):
    """The fastest by a table measured on this kind of device; without a table, and on CPUs, Cholesky in float32."""

    kind: Literal["automatic"] = "automatic"


class CholeskyInversion(Choice):
    """Cholesky. A factor that fails in float32 is tried in float64."""

    kind: Literal["cholesky"] = "cholesky"
    dtype: Literal["float32", "float64"] = Field(default="float32", description="float64 models always use float64.")


class NewtonSchulzInversion(Choice):
    """X <- X + X (I - A X), from the inverse in use if that is close; Cholesky if it would not converge."""

    kind: Literal["newton_schulz"] = "newton_schulz"
    update_dtype: Literal["float16", "bfloat16", "float32"] = Field(
        default="float16", description="Dtype to which the operands of X (I - A X) are rounded; sums are float32."
    )
    residual: Literal["float32", "split"] = Field(
        default="split",
        description="Computation of I - A X: in float32, TF32 off; or by three products of numbers split into two "
        "float16, as accurate up to a condition number of 1e4.",
    )
    max_iterations: int = Field(
        default=20, ge=1, le=40, description="Factors that are expected to need more are inverted by Cholesky."
    )
    tolerance: float = Field(
        default=1e-3, gt=0, le=0.05, description="Spectral norm of I - A X at which the iteration stops."
    )


InversionChoice = Annotated[AutomaticInversion | CholeskyInversion | NewtonSchulzInversion, Field(discriminator="kind")]
