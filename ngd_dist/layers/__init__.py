"""Module kinds: each turns one module's tensors into rows and a gradient matrix, and back. Start at `base.Layer`.

A new kind is one file and one line here, or one in `other_libraries`. The match is on the exact type: a subclass may
compute something else.
"""

from torch import nn

from ngd_dist.layers.attention import InProjection
from ngd_dist.layers.base import Layer, OnRun, Replicate, Rows, Run
from ngd_dist.layers.batchnorm import BatchNorm, SyncBatchNorm
from ngd_dist.layers.conv import Conv
from ngd_dist.layers.embedding import Embedding
from ngd_dist.layers.groupnorm import GroupNorm
from ngd_dist.layers.layernorm import LayerNorm, RMSNorm
from ngd_dist.layers.linear import Linear
from ngd_dist.layers.other_libraries import LAYERS_BY_NAME

__all__ = ["LAYERS", "LAYERS_BY_NAME", "Layer", "OnRun", "Replicate", "Rows", "Run", "kind_of"]

LAYERS: dict[type[nn.Module], type[Layer]] = {
    nn.Linear: Linear,
    nn.Conv1d: Conv,
    nn.Conv2d: Conv,
    nn.Conv3d: Conv,
    nn.Embedding: Embedding,
    nn.MultiheadAttention: InProjection,
    nn.BatchNorm1d: BatchNorm,
    nn.BatchNorm2d: BatchNorm,
    nn.BatchNorm3d: BatchNorm,
    nn.SyncBatchNorm: SyncBatchNorm,
    nn.GroupNorm: GroupNorm,
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
}


def kind_of(module: nn.Module) -> type[Layer] | None:
    """Returns the kind that covers modules of this very type, or None."""
    own = type(module)
    return LAYERS.get(own) or LAYERS_BY_NAME.get(f"{own.__module__}.{own.__qualname__}")
