"""The settings of methods that change the model: see `ngd_dist.transforms`."""

from typing import Literal

from pydantic import Field

from ngd_dist.config.choice import Settings

__all__ = ["SNGDConfig"]


class SNGDConfig(Settings):
    """Structured natural gradient (arXiv 2412.07441): W = W' G^-1/2, where G = E[x xᵀ] + epsilon I of a layer's input.

    >>> SNGDConfig(T=20, epsilon=0.3).ema_decay
    0.6
    """

    kind: Literal["sngd"] = "sngd"
    T: int = Field(default=100, ge=1, description="Steps between two refreshes of G; the first is after step 1.")
    epsilon: float = Field(
        default=0.1,
        gt=0,
        description="Added to the diagonal of G, in units of a squared input. With a small one rare inputs get large "
        "steps, and lr must be small.",
    )
    ema_decay: float = Field(
        default=0.6,
        ge=0,
        lt=1,
        description="Share of the old E[x xᵀ] in the new one at a refresh; 0.6 is 0.995 per step over 100 steps, as in "
        "the authors' code. 0: the inputs of one step alone.",
    )
    root: Literal["eigh", "newton_schulz"] = Field(
        default="eigh",
        description="Square roots by eigendecomposition in float64, or by coupled Newton-Schulz iterations in the "
        "weights' precision, which are matrix products alone.",
    )
    max_inputs: int = Field(
        default=4096, ge=1, description="Inputs of the widest layer that is reconstructed; wider ones stay as they are."
    )
    exclude: tuple[str, ...] = Field(
        default=(), description="Patterns of the names of modules that stay as they are, such as 'head' or 'blocks.*'."
    )
