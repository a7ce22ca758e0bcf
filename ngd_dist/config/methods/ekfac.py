"""EKFAC: second moments in the eigenbasis of the factors of K-FAC."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ngd_dist.config.methods.base import DEFAULT_THRESHOLD, SHARING, PreconditionerConfig, Sharing, refuses_inversion
from ngd_dist.config.methods.kfac import KFAC

if TYPE_CHECKING:
    from ngd_dist.config.ngd import NGDConfig

__all__ = ["EKFAC"]


class EKFAC(PreconditionerConfig):
    """Per-entry second moments in the eigenbasis of K-FAC's factors ([GLB18]). Damping is exact."""

    kind: Literal["ekfac"] = "ekfac"
    method: ClassVar[str] = "ngd_dist.preconditioners.ekfac:EKFAC"
    thresholds: ClassVar[Mapping[str, float]] = {**KFAC.thresholds, "S": DEFAULT_THRESHOLD}
    sharing: Sharing = Field(default="expand", description=SHARING)

    def refuses(self, config: "NGDConfig") -> str | None:
        return refuses_inversion(self.kind, config)
