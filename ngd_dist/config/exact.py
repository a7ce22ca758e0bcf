"""The settings of natural gradients of models small enough to be treated exactly: see `ngd_dist.exact`."""

from typing import Literal

from pydantic import Field, field_validator

from ngd_dist.config.choice import Settings

__all__ = ["EnergyNGDConfig", "GridSearch"]


class GridSearch(Settings):
    """Tries the lengths lr, lr base, lr base^2 ... and takes that of the least loss; none if no loss is lower.

    It tries them in groups, the longest first, and ends with the first group after which some length lowers the loss,
    and the best one is not the shortest so far.

    >>> GridSearch(count=3).count
    3
    """

    base: float = Field(default=0.5, gt=0, lt=1, description="Ratio of a length to the one before it.")
    count: int = Field(default=31, ge=1, description="Lengths that are tried at most.")
    group: int = Field(
        default=4, ge=1, description="Lengths whose losses are evaluated at once; count: all of them, as in the paper."
    )


class EnergyNGDConfig(Settings):
    """Energy natural gradient (arXiv 2302.13163) of a sum of mean squared residuals, or mean energies.

    >>> EnergyNGDConfig(part_weights={"boundary": 4.0}).damping
    1e-06
    """

    lr: float = Field(
        default=1.0,
        gt=0,
        description="Length of a step; 1 is the full Gauss-Newton step. With a line search, the longest that it tries.",
    )
    line_search: GridSearch | None = Field(
        default=GridSearch(), description="None: every step has the length lr, whatever the loss does."
    )
    damping: float = Field(
        default=1e-6,
        ge=0,
        description="Added to the diagonal of the Gram matrix of the weighted residuals' Jacobian, at the first step. "
        "0: pseudo-inverse, at every step.",
    )
    damping_factor: float = Field(
        default=10.0,
        ge=1,
        description="With a line search: the damping is divided by it after a step of a quarter of lr or more, and "
        "multiplied after one below 1/32 of it. 1: the damping stays.",
    )
    rcond: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="If the damping is 0, or too small for a Cholesky factorisation: eigenvalues of the Gram matrix "
        "below this times its largest count as 0. None: float64's epsilon times its size.",
    )
    form: Literal["auto", "weights", "kernel"] = Field(
        default="auto",
        description="The matrix that is solved with: weights by weights, or residuals by residuals. auto: the smaller.",
    )
    chunk: int = Field(
        default=1024,
        ge=1,
        description="Points whose residuals are differentiated, or evaluated in the line search, at a time.",
    )
    momentum: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the last direction that this one is drawn to (SPRING); without damping it acts only "
        "where the residuals say nothing.",
    )
    part_weights: dict[str, float] = Field(
        default={}, description="Factor > 0 of each part's mean in the loss; 1 for a part without."
    )

    @field_validator("part_weights")
    @classmethod
    def _are_positive(cls, part_weights: dict[str, float]) -> dict[str, float]:
        if bad := {name: weight for name, weight in part_weights.items() if not weight > 0}:
            raise ValueError(f"part_weights must be > 0, got {bad}; leave a part out of the residuals to ignore it")
        return part_weights
