"""nn.LayerNorm and nn.RMSNorm, and modules of other libraries that normalise alike."""

import torch.nn.functional as F
from torch import Tensor

from ngd_dist.layers.norm import ChannelNorm, Norm

__all__ = ["ChannelLayerNorm", "ChannelRMSNorm", "LayerNorm", "RMSNorm"]


class LayerNorm(Norm):
    """x [N, ..., *units] is normalised over its last dimensions; units are their elements."""

    def expected_input(self, x: Tensor) -> str | None:
        units = len(self.shapes[0])
        return None if x.ndim > units + self.batch_dim else f"[samples, ..., {', '.join(['units'] * units)}]"

    def _normalised(self, kept: Tensor) -> Tensor:
        return F.layer_norm(kept.to(self.dtype), self.shapes[0], eps=self._eps)

    def _rows(self, x: Tensor) -> Tensor:
        x = x.movedim(self.batch_dim, 0)
        return x.reshape(1, x.shape[0], -1, self.shapes[0].numel())

    @property
    def _eps(self) -> float:
        eps = self.module.eps
        assert isinstance(eps, int | float)
        return eps


class RMSNorm(LayerNorm):
    """x is divided by the root of its mean square; no mean is subtracted."""

    def _normalised(self, kept: Tensor) -> Tensor:
        # A module that scales by 1 + weight has the same gradient, and so the same rows.
        module = self.module
        eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
        # None: that of the input's dtype, but float32 for 16 bits, which is the dtype that the input has here.
        assert eps is None or isinstance(eps, int | float)
        return F.rms_norm(kept.to(self.dtype), self.shapes[0], eps=eps)


class ChannelLayerNorm(ChannelNorm):
    """x [N, C, ...] is normalised over the channels of each position."""

    def _normalised(self, kept: Tensor) -> Tensor:
        eps = self.module.eps
        assert isinstance(eps, int | float)
        return F.layer_norm(kept.to(self.dtype).movedim(1, -1), self.shapes[0], eps=eps).movedim(-1, 1)


class ChannelRMSNorm(ChannelNorm):
    """x [N, C, ...] is divided by the root of the mean square of the channels of each position."""

    def _normalised(self, kept: Tensor) -> Tensor:
        eps = self.module.eps
        assert isinstance(eps, int | float)
        return F.rms_norm(kept.to(self.dtype).movedim(1, -1), self.shapes[0], eps=eps).movedim(-1, 1)
