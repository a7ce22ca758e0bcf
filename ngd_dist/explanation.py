"""What `NGD.explain` prints."""

from collections.abc import Mapping, Sequence

from ngd_dist.config import NGDConfig
from ngd_dist.layers import Layer
from ngd_dist.preconditioners import Preconditioner
from ngd_dist.strategies import Strategy

__all__ = ["explain"]


def explain(
    config: NGDConfig,
    layers: Sequence[Layer],
    preconditioners: Mapping[str, Preconditioner],
    strategy: Strategy,
    plain_parameters: Mapping[str, str],
) -> str:
    """Returns a table of the layers and their costs, and the reason why each other parameter is not among them."""
    return ""
