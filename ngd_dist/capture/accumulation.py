"""Hooks that tell of each layer when autograd has added to the `grad` of one of its parameters."""

from collections.abc import Callable, Collection, Iterable
from functools import partial

from torch import nn
from torch.utils.hooks import RemovableHandle

from ngd_dist.layers.hooks import remove

__all__ = ["Accumulation"]


class Accumulation:
    """Calls `hook(layer, parameter)` after each accumulation into a parameter that is watched."""

    def __init__(self, hook: Callable[[str, nn.Parameter], None]) -> None:
        self._hook = hook
        self._handles: dict[str, dict[nn.Parameter, RemovableHandle]] = {}

    def watch(self, layer: str, parameters: Iterable[nn.Parameter]) -> None:
        """Watches those of a layer's parameters that are trained."""
        handles = self._handles.setdefault(layer, {})
        for p in parameters:
            if p.requires_grad and p not in handles:
                handles[p] = p.register_post_accumulate_grad_hook(partial(self._hook, layer))

    def keep(self, layers: Collection[str]) -> None:
        """Watches the parameters of other layers no longer."""
        for layer in self._handles.keys() - set(layers):
            remove(self._handles.pop(layer).values())
