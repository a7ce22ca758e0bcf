"""Which activation module reads what a layer returns, and its derivative there: for methods that ask for slopes.

A module is recognised by being given the very tensor that the layer returned, or what a normalisation or dropout made
of it: a slope is then taken where the activation was, and the normalisation's own scale is left to the layer's step
length. Activations that are called as functions are not seen; their layers have no slope.
"""

import weakref
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from ngd_dist.layers import Run
from ngd_dist.layers.hooks import ModuleHook, is_transformed

__all__ = ["Activations", "is_activation"]

# Each output depends on the input of the same place alone, without chance. The match is on the exact type.
ELEMENTWISE: frozenset[type[nn.Module]] = frozenset(
    {
        nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid, nn.Mish,
        nn.PReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Tanh, nn.Tanhshrink,
    }
)  # fmt: skip
# All modules of these are elementwise. None of them is imported here.
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
    return type(module) in ELEMENTWISE or type(module).__module__ in ELEMENTWISE_FILES


class Activations:
    """Gives each run of a layer its slope while the model runs forward.

    `found`: by name of each layer that has run, the type of the activation that read it, or None. Its hooks go with it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.found: dict[str, str | None] = {}
        self._unread: MutableMapping[Tensor, tuple[str, Run]] = WeakTensorKeyDictionary()
        own = weakref.ref(self)
        handles: list[RemovableHandle] = []
        for module in model.modules():
            if is_activation(module):
                # Before it runs: it may write its output where its input was.
                handles.append(module.register_forward_pre_hook(ModuleHook(_note_input(own)), with_kwargs=True))
            elif type(module) in TRANSPARENT:
                handles.append(module.register_forward_hook(ModuleHook(_note_output(own)), with_kwargs=True))
        for handle in handles:
            weakref.finalize(self, handle.remove)

    def expect(self, layer: str, output: Tensor, run: Run) -> None:
        """Waits for the activation that reads this output; the first one counts."""
        self.found.setdefault(layer, None)
        self._unread[output] = (layer, run)

    def on_activation(self, module: nn.Module, x: Tensor) -> None:
        """Sets the slope of the run that returned x, if one did."""
        if x in self._unread:
            layer, run = self._unread.pop(x)
            self.found[layer] = type(module).__name__
            run.slope = _slope(module, x)

    def on_transparent(self, x: Tensor, output: Tensor) -> None:
        """Waits for the activation that reads `output`, made of x place by place."""
        if x in self._unread and output is not x:
            self._unread[output] = self._unread.pop(x)


def _slope(module: nn.Module, x: Tensor) -> Tensor:
    """Returns the derivative of each output by the input of the same place, by autograd."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        y = module.forward(leaf.clone())  # the clone may be overwritten
        (slope,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    return slope


def _note_input(own: "weakref.ref[Activations]") -> Callable[..., None]:
    """Returns a hook. The model outlives the optimizer."""

    def hook(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        alive = own()
        if alive is not None and not is_transformed():
            alive.on_activation(module, _first(args, *rest))

    return hook


def _note_output(own: "weakref.ref[Activations]") -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        alive = own()
        if alive is not None and not is_transformed():
            kwargs, output = rest
            alive.on_transparent(_first(args, kwargs), output)

    return hook


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    tensor: Tensor = args[0] if args else next(iter(kwargs.values()))
    return tensor
