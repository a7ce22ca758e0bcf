"""Module kinds: each turns one module's tensors into rows and a gradient matrix, and back. Start at `base.Layer`.

A new kind is one file and one line here, or one in `other_libraries`; a kind of another package is entered by
`register_layer` (docs/extending.md). The match is on the exact type: a subclass may compute something else.
"""

from inspect import isabstract

from torch import nn

from ngd_dist.engines import class_of
from ngd_dist.errors import ConfigError
from ngd_dist.factors.form import Replicate
from ngd_dist.layers.attention import InProjection
from ngd_dist.layers.base import Layer, Listener, OnRun
from ngd_dist.layers.batch import LayerBatch
from ngd_dist.layers.batchnorm import BatchNorm, SyncBatchNorm
from ngd_dist.layers.conv import Conv
from ngd_dist.layers.embedding import Embedding
from ngd_dist.layers.groupnorm import GroupNorm
from ngd_dist.layers.jet import Jet, JetLinear
from ngd_dist.layers.layernorm import LayerNorm, RMSNorm
from ngd_dist.layers.linear import Linear
from ngd_dist.layers.other_libraries import LAYERS_BY_NAME
from ngd_dist.layers.recurrent import CellMap, GateMap
from ngd_dist.layers.run import Run
from ngd_dist.layers.transposed_conv import TransposedConv

__all__ = [
    "LAYERS",
    "LAYERS_BY_NAME",
    "BatchNorm",
    "CellMap",
    "Conv",
    "Embedding",
    "GateMap",
    "GroupNorm",
    "InProjection",
    "Jet",
    "Layer",
    "LayerBatch",
    "LayerNorm",
    "Linear",
    "Listener",
    "OnRun",
    "RMSNorm",
    "Replicate",
    "Run",
    "SyncBatchNorm",
    "TransposedConv",
    "kind_of",
    "register_layer",
]

LAYERS: dict[type[nn.Module], type[Layer]] = {
    nn.Linear: Linear,
    JetLinear: Jet,
    nn.Conv1d: Conv,
    nn.Conv2d: Conv,
    nn.Conv3d: Conv,
    nn.ConvTranspose1d: TransposedConv,
    nn.ConvTranspose2d: TransposedConv,
    nn.ConvTranspose3d: TransposedConv,
    nn.Embedding: Embedding,
    nn.MultiheadAttention: InProjection,
    nn.RNN: GateMap,
    nn.LSTM: GateMap,
    nn.GRU: GateMap,
    nn.RNNCell: CellMap,
    nn.LSTMCell: CellMap,
    nn.GRUCell: CellMap,
    nn.BatchNorm1d: BatchNorm,
    nn.BatchNorm2d: BatchNorm,
    nn.BatchNorm3d: BatchNorm,
    nn.SyncBatchNorm: SyncBatchNorm,
    nn.GroupNorm: GroupNorm,
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
}


def register_layer(module_type: type[nn.Module], kind: type[Layer]) -> None:
    """Lets `kind` cover modules of this very type, in every `NGD` that is built from now on.

    `kind` is a subclass of `Layer`; if the module computes the same as torch's, it may be a kind of this package:

        register_layer(MyLinear, Linear)

    Raises: ConfigError, if either is something else, or the type is covered by another kind already.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise ConfigError(f"module_type must be a subclass of torch.nn.Module, got {module_type!r}; give the class")
    if not (isinstance(kind, type) and issubclass(kind, Layer)):
        raise ConfigError(f"kind must be a subclass of ngd_dist.layers.Layer, got {kind!r}; give the class")
    if isabstract(kind):
        missing = ", ".join(sorted(kind.__abstractmethods__))
        raise ConfigError(f"kind must define every abstract method of Layer, and {kind.__name__} lacks {missing}")
    covering = _kind_of_type(module_type)
    if covering is not None and covering is not kind:
        name = module_type.__name__
        raise ConfigError(
            f"{name} is covered by {covering.__name__}, got {kind.__name__}; register a subclass of {name}"
        )
    LAYERS[module_type] = kind


def kind_of(module: nn.Module) -> type[Layer] | None:
    """Returns the kind that covers modules of this very type, or None."""
    return _kind_of_type(class_of(module))


def _kind_of_type(module_type: type[nn.Module]) -> type[Layer] | None:
    return LAYERS.get(module_type) or LAYERS_BY_NAME.get(f"{module_type.__module__}.{module_type.__qualname__}")
