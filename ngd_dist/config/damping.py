"""Rules for damping over the steps."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ngd_dist.config.choice import Choice

__all__ = ["ConstantDamping", "DampingChoice", "ExponentialDamping", "LevenbergMarquardt", "PolynomialDamping"]


class ConstantDamping(Choice):
    """The damping of each param group, until the user sets another."""

    kind: Literal["constant"] = "constant"


class ExponentialDamping(Choice):
    """damping * factor ** (step / every), never below `minimum`."""

    kind: Literal["exponential"] = "exponential"
    factor: float = Field(gt=0, le=1, description="Factor on damping over `every` steps.")
    every: int = Field(default=1, ge=1, description="Optimizer steps.")
    minimum: float = Field(default=1e-8, gt=0, description="Damping never falls below.")


class PolynomialDamping(Choice):
    """From damping to `end` over `steps` steps: end + (damping - end) * (1 - step / steps) ** power; then `end`."""

    kind: Literal["polynomial"] = "polynomial"
    end: float = Field(gt=0, description="Damping from step `steps` on.")
    steps: int = Field(ge=1, description="Optimizer steps.")
    power: float = Field(default=1.0, gt=0, description="1: a straight line.")


class LevenbergMarquardt(Choice):
    """Damping follows the quadratic model's success at predicting the loss ([MG15] 6.5). `NGD.step` needs an objective.

    rho = (change of the loss) / (change of the model); above `high` damping is multiplied by decay ** every, below
    `low` divided by it.
    """

    kind: Literal["levenberg_marquardt"] = "levenberg_marquardt"
    needs_objective: ClassVar[bool] = True
    decay: float = Field(
        default=0.95,
        gt=0,
        lt=1,
        description="omega, per step ([MG15]). 0.9 threw a run on mini-batches of digits far off.",
    )
    every: int = Field(default=5, ge=1, description="Optimizer steps between two adaptations.")
    low: float = Field(default=0.25, gt=0, lt=1, description="rho below which damping rises.")
    high: float = Field(default=0.75, gt=0, lt=1, description="rho above which damping falls.")
    minimum: float = Field(default=1e-5, gt=0, description="Damping never falls below.")
    maximum: float = Field(default=1e4, gt=0, description="Damping never rises above.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low must be < high, got {self.low} and {self.high}")
        if self.minimum >= self.maximum:
            raise ValueError(f"minimum must be < maximum, got {self.minimum} and {self.maximum}")
        return self


DampingChoice = Annotated[
    ConstantDamping | ExponentialDamping | PolynomialDamping | LevenbergMarquardt, Field(discriminator="kind")
]
