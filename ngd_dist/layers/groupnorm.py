"""nn.GroupNorm: units are channels."""

import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist.layers.norm import ChannelNorm

__all__ = ["GroupNorm"]


class GroupNorm(ChannelNorm):
    """x [N, C, ...] is normalised over each group of a sample's channels."""

    module: nn.GroupNorm

    def _normalised(self, kept: Tensor) -> Tensor:
        return F.group_norm(kept.to(self.dtype), self.module.num_groups, eps=self.module.eps)
