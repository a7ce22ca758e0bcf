"""The step size of `ngd_dist.exact.dually_flat`."""

from pydantic import Field

from ngd_dist.config.choice import Settings

__all__ = ["StepSize"]


class StepSize(Settings):
    """Step size a / (1 + b t) of step t = 0, 1, ...; with b > 0 it is a Robbins-Monro sequence.

    >>> StepSize(a=0.5, b=0.1).at(10)
    0.25
    """

    a: float = Field(
        default=0.03, gt=0, description="Step size of the first step; a and b are the best of a grid on two models."
    )
    b: float = Field(
        default=0.01,
        ge=0,
        description="Rate of decay per step. With 0 the step size is constant: the steps then need not converge.",
    )

    def at(self, step: int) -> float:
        """Returns the step size of a step, counted from 0."""
        return self.a / (1 + self.b * step)
