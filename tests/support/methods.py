"""The methods that ship: those of the registry without the ones that a test brings."""

from ngd_dist.config import PRECONDITIONERS, PreconditionerConfig
from ngd_dist.config.methods.base import is_ours

__all__ = ["SHIPPED"]

SHIPPED: dict[str, type[PreconditionerConfig]] = {
    kind: choice for kind, choice in PRECONDITIONERS.items() if is_ours(choice)
}
