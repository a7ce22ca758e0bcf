"""Helpers of hooks on modules and tensors: the backward pass that calls them, and the tensors in their arguments."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

__all__ = [
    "OUTSIDE_BACKWARD",
    "ModuleHook",
    "accumulates",
    "backward_task",
    "is_transformed",
    "keeps_graph",
    "remove",
    "tensors_in",
    "weakly",
]

OUTSIDE_BACKWARD = -1
T = TypeVar("T")


class ModuleHook:
    """A hook that stays behind when its module is pickled or deeply copied: the copy has a hook that does nothing.

    So `torch.save(model)`, `copy.deepcopy(model)` and sending a model to another process work as without an optimizer,
    and a saved model loads without this library. torch.compile breaks the graph at hooked modules.
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook: Callable[..., Any] = torch.compiler.disable(hook)

    def __call__(self, *args: Any) -> Any:
        return self._hook(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        # A bound method of the standard library that takes any arguments, and returns None.
        return getattr, (nullcontext(), "__exit__")


def backward_task() -> int:
    """Returns autograd's number for the backward pass that this thread is in, or OUTSIDE_BACKWARD.

    Not in torch's public API, but torch.utils.checkpoint itself tells backward passes apart by it.
    """
    return int(torch._C._current_graph_task_id())


def keeps_graph() -> bool:
    """Returns whether the backward pass that is under way leaves its graph for another one (`retain_graph=True`).

    Not in torch's public API; torch's compiler calls the same before it reuses a buffer.
    """
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def accumulates(parameter: nn.Parameter) -> bool | None:
    """Returns whether the backward pass that is under way adds to `parameter.grad`.

    None: it returns the gradient instead, as `torch.autograd.grad(loss, parameters)` does. Not in torch's public API,
    but `torch.autograd.graph.register_multi_grad_hook` calls the same.
    """
    if not parameter.requires_grad:
        return False
    was_enabled = torch.is_grad_enabled()
    torch._C._set_grad_enabled(True)  # else there is no edge; torch.enable_grad takes three times as long
    try:
        return bool(torch._C._will_engine_execute_node(get_gradient_edge(parameter).node))
    except RuntimeError:  # torch raises if the gradient is returned
        return None
    finally:
        torch._C._set_grad_enabled(was_enabled)


def is_transformed() -> bool:
    """Returns whether torch.func (vmap, grad, jacrev ...) runs the model: its tensors can't be kept."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def weakly(method: Callable[..., T]) -> Callable[..., T | None]:
    """Returns the bound method without a hold on its object; once that is gone it does nothing, and returns None.

    Hooks live as long as the model, which may outlive the optimizer.
    """
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> T | None:
        alive = reference()
        return None if alive is None else alive(*args)

    return call


def remove(handles: Iterable[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields the tensors of nested arguments or results, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))
