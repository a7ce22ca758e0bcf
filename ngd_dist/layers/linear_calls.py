"""Intercepts the linear maps inside torch's functional attention, which calls none of its module's submodules."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ngd_dist.layers.hooks import ModuleHook, is_transformed

__all__ = ["LinearCalls", "OnLinear"]

# Called with the input, the weight and the output of each linear map, and the number of samples: None without a batch.
OnLinear = Callable[[Tensor, Tensor, Tensor, int | None], None]
PLAIN = frozenset({Tensor, nn.Parameter})
Function = TypeVar("Function", bound=Callable[..., Any])


def _uncompiled(function: Function) -> Function:
    """Returns the function for torch.compile to leave alone: it supports neither modes entered by hand nor copied code.

    It loads the compiler, so don't use it as a decorator on import.
    """
    left_alone: Function = torch.compiler.disable(function)
    return left_alone


class LinearCalls(TorchFunctionMode):
    """The linear maps of one attention module. Active in its forward pass, which takes some 0.2 ms longer on the host.

    The functional attention runs as a copy with another `linear`. To handle each of its 37 calls instead would take
    longer, and need a copy too: its first lines hand the whole call to the active mode.
    """

    def __init__(self, module: nn.MultiheadAttention) -> None:
        super().__init__()
        self._module = module
        self._is_active = False
        self._listeners: OrderedDict[int, OnLinear] = OrderedDict()
        self._listen_uncompiled = _uncompiled(self._listen)

    def watch(self, on_linear: OnLinear) -> list[RemovableHandle]:
        """Returns the handles of hooks that call `on_linear` for each linear map of a forward pass with gradient."""

        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            # Without gradient nothing is needed, and a mode would keep torch from its fused kernel.
            if torch.is_grad_enabled() and not self._is_active and not is_transformed():
                self._is_active = True
                self.__enter__()  # type: ignore[no-untyped-call]

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._is_active:
                self._is_active = False
                self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

        listener = RemovableHandle(self._listeners)
        self._listeners[listener.id] = on_linear
        return [
            listener,
            self._module.register_forward_pre_hook(ModuleHook(enter)),
            # After an error too, such as activation checkpointing's early stop; before all other hooks.
            self._module.register_forward_hook(ModuleHook(leave), prepend=True, always_call=True),
        ]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # Subclasses of Tensor have overrides of their own, which a copy would pass by.
        if func is F.multi_head_attention_forward and isinstance(func, FunctionType) and PLAIN.issuperset(types):
            return self._listen_uncompiled(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _listen(self, attention: FunctionType, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Returns the result of attention, run with another `linear` in it and in its projection functions."""
        query: Tensor = args[0]
        samples = query.shape[1] if query.ndim == 3 else None

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            output = F.linear(x, weight, bias)
            for on_linear in self._listeners.values():
                on_linear(x, weight, output, samples)
            return output

        names = attention.__globals__ | {"linear": linear}
        # Itself among them: other active modes are given the function by its name.
        for name in attention.__code__.co_names:
            inner = attention.__globals__.get(name)
            if isinstance(inner, FunctionType) and "linear" in inner.__code__.co_names:
                names[name] = _copy(inner, names)
        return _copy(attention, names)(*args, **kwargs)


def _copy(function: FunctionType, names: dict[str, Any]) -> FunctionType:
    """Returns the function with these global names."""
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
