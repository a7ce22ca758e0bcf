"""TKFAC: Kronecker factors whose product has the trace of the Fisher block."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from ngd_dist.config.methods.base import DEFAULT_THRESHOLD, SHARING, PreconditionerConfig, Sharing

__all__ = ["TKFAC"]


class TKFAC(PreconditionerConfig):
    """Kronecker factors Phi and Psi, times the exact trace delta of the layer's Fisher block ([G21])."""

    kind: Literal["tkfac"] = "tkfac"
    method: ClassVar[str] = "ngd_dist.preconditioners.tkfac:TKFAC"
    thresholds: ClassVar[Mapping[str, float]] = {"Phi": DEFAULT_THRESHOLD, "Psi": DEFAULT_THRESHOLD}
    sharing: Sharing = Field(default="expand", description=SHARING)
