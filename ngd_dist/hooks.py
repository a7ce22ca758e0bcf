"""What hooks on modules and tensors need of torch: which backward pass calls them, and what they are given."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

__all__ = ["OUTSIDE_BACKWARD", "backward_task", "remove", "tensors_in", "uncompiled"]

OUTSIDE_BACKWARD = -1
Hook = TypeVar("Hook", bound=Callable[..., None])


def backward_task() -> int:
    """Returns autograd's number for the backward pass that this thread is in, or OUTSIDE_BACKWARD.

    Not in torch's public API, but what torch.utils.checkpoint itself tells backward passes apart by.
    """
    return int(torch._C._current_graph_task_id())


def uncompiled(hook: Hook) -> Hook:
    """Returns the hook as torch.compile leaves it alone: it breaks the graph at the hooked layers."""
    left_alone: Hook = torch.compiler.disable(hook)
    return left_alone


def remove(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields the tensors of nested arguments, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
