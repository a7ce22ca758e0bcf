"""The methods that ship: those of the registry without the ones that a test brings."""

from ngd_dist.config import EKFAC, KFAC, LNGD, PRECONDITIONERS, SENG, SINGD, TKFAC, Eva, PreconditionerConfig
from ngd_dist.config.methods.base import is_ours

__all__ = ["LOCAL", "METHODS", "SHIPPED"]

SHIPPED: dict[str, type[PreconditionerConfig]] = {
    kind: choice for kind, choice in PRECONDITIONERS.items() if is_ours(choice)
}
# Those whose step depends on the division of a batch between ranks, since each rank has a cache of its own samples.
LOCAL = frozenset({"seng"})
# Each of them, and with shared weights reduced.
METHODS: dict[str, PreconditionerConfig] = {
    "kfac": KFAC(),
    "reduce": KFAC(sharing="reduce"),
    "ekfac": EKFAC(),
    "lngd": LNGD(),
    "tkfac": TKFAC(),
    "tkfac reduce": TKFAC(sharing="reduce"),
    "eva": Eva(),
    "eva reduce": Eva(sharing="reduce"),
    "singd": SINGD(),
    "seng": SENG(),
}
