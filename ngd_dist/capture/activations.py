"""Finds the activation module that reads a layer's output, and its derivative there, for methods that need slopes.

A module is recognised if its input is the very tensor that the layer returned, or a normalisation or dropout of that
tensor. The slope is then that of the activation, and the scale of the normalisation is left to the layer's step length.
Activations that are called as functions are not seen; their layers have no slope.
"""

import weakref
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from ngd_dist.engines import class_of
from ngd_dist.layers import Run
from ngd_dist.layers.hooks import ModuleHook, is_transformed

__all__ = ["Activations", "is_activation"]

# Each output depends on the input at the same place alone, without randomness. The match is on the exact type.
ELEMENTWISE: frozenset[type[nn.Module]] = frozenset(
    {
        nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid, nn.Mish,
        nn.PReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Tanh, nn.Tanhshrink,
    }
)  # fmt: skip
# All modules of these files are elementwise. None of them is imported here.
ELEMENTWISE_FILES = ("timm.layers.activations", "transformers.activations")
TRANSPARENT: frozenset[type[nn.Module]] = frozenset(
    {
        nn.AlphaDropout, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.Dropout, nn.Dropout1d, nn.Dropout2d,
        nn.Dropout3d, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LayerNorm, nn.RMSNorm,
        nn.SyncBatchNorm,
    }
)  # fmt: skip


def is_activation(module: nn.Module) -> bool:
    """Returns whether slopes can be taken of this module."""
    kind = class_of(module)
    return kind in ELEMENTWISE or kind.__module__ in ELEMENTWISE_FILES


class Activations:
    """Gives each run of a layer its slope while the model runs forward.

    `by_layer`: by name of each layer that has run, the type of the activation that read it, or None. Its hooks are
    removed with it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.by_layer: dict[str, str | None] = {}
        self._unread: MutableMapping[Tensor, tuple[str, Run]] = WeakTensorKeyDictionary()
        reference = weakref.ref(self)
        handles: list[RemovableHandle] = []
        for module in model.modules():
            if is_activation(module):
                # Before it runs: it may write its output where its input was.
                handles.append(module.register_forward_pre_hook(ModuleHook(_note_input(reference)), with_kwargs=True))
            elif class_of(module) in TRANSPARENT:
                handles.append(module.register_forward_hook(ModuleHook(_note_output(reference)), with_kwargs=True))
        for handle in handles:
            weakref.finalize(self, handle.remove)

    def expect(self, layer: str, output: Tensor, run: Run) -> None:
        """Waits for the activation that reads this output; the first one counts."""
        self.by_layer.setdefault(layer, None)
        self._unread[output] = (layer, run)

    def on_activation(self, module: nn.Module, x: Tensor) -> None:
        """Sets the slope of the run that returned x, if there is one."""
        if x in self._unread:
            layer, run = self._unread.pop(x)
            self.by_layer[layer] = class_of(module).__name__
            run.slope = _slope(module, x)

    def on_transparent(self, x: Tensor, output: Tensor) -> None:
        """Waits for the activation that reads `output`, a transparent module's result for x."""
        if x in self._unread and output is not x:
            self._unread[output] = self._unread.pop(x)


def _slope(module: nn.Module, x: Tensor) -> Tensor:
    """Returns the derivative of each output by the input at the same place, by autograd."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        y = module.forward(leaf.clone())  # the clone may be overwritten
        (slope,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    return slope


def _note_input(reference: "weakref.ref[Activations]") -> Callable[..., None]:
    """Returns a hook without a hold on the optimizer, which the model may outlive."""

    def hook(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        alive = reference()
        if alive is not None and not is_transformed():
            alive.on_activation(module, _first(args, *rest))

    return hook


def _note_output(reference: "weakref.ref[Activations]") -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        alive = reference()
        if alive is not None and not is_transformed():
            kwargs, output = rest
            alive.on_transparent(_first(args, kwargs), output)

    return hook


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    tensor: Tensor = args[0] if args else next(iter(kwargs.values()))
    return tensor
