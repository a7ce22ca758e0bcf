"""Counts the bytes of all tensors that an object holds, by kind: from the tensors, not from the process's size."""

from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["held_bytes", "tensors_of"]

OPAQUE = (str, bytes, int, float, type, ModuleType, BuiltinFunctionType, torch.dtype, torch.device, torch.Generator)


def held_bytes(root: object, kinds: Mapping[str, str], excluded: nn.Module | None = None) -> dict[str, int]:
    """Returns bytes by kind of every tensor reachable from root, each storage once, largest kind first.

    kinds: {part of a tensor's path: kind}; the first that a path contains decides, else the kind is "other".
    excluded: a model whose parameters, gradients and buffers don't count.
    """
    not_counted = [] if excluded is None else [*excluded.parameters(), *excluded.buffers()]
    not_counted += [p.grad for p in not_counted if p.grad is not None]
    seen = {tensor.untyped_storage().data_ptr() for tensor in not_counted}
    bytes_of: dict[str, int] = {}
    for path, tensor in tensors_of(root):
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen:
            continue
        seen.add(storage.data_ptr())
        kind = next((kind for part, kind in kinds.items() if part in path), "other")
        bytes_of[kind] = bytes_of.get(kind, 0) + storage.nbytes()
    return dict(sorted(bytes_of.items(), key=lambda item: -item[1]))


def tensors_of(root: object) -> Iterator[tuple[str, Tensor]]:
    """Yields (path, tensor) for every tensor reachable from root through containers, attributes and closures."""
    seen: set[int] = set()
    kept: list[object] = []  # an id belongs to one object only while that object lives
    pending: list[tuple[str, object]] = [("", root)]
    while pending:
        path, item = pending.pop()
        if id(item) in seen or item is None or isinstance(item, OPAQUE):
            continue
        seen.add(id(item))
        kept.append(item)
        if isinstance(item, Tensor):
            local = getattr(item, "_local_tensor", None)  # of a DTensor, which has no storage of its own
            if local is not None:
                pending.append((path, local))
            elif item.layout is torch.strided:
                yield path, item
            continue
        pending.extend((f"{path}.{name}", part) for name, part in _parts(item))


def _parts(item: Any) -> Iterator[tuple[str, object]]:
    if isinstance(item, Mapping):
        for key, value in item.items():
            yield "keys", key
            yield str(key) if isinstance(key, str | int) else type(key).__name__, value
    elif isinstance(item, list | tuple | set | frozenset):
        yield from ((str(index), value) for index, value in enumerate(item))
    elif isinstance(item, FunctionType):
        yield from (("closure", _content(cell)) for cell in item.__closure__ or ())
    elif isinstance(item, MethodType):
        yield "self", item.__self__
    else:
        yield from getattr(item, "__dict__", {}).items()
        for name in (name for kind in type(item).__mro__ for name in _slots(kind)):
            yield name, getattr(item, name, None)


def _slots(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _content(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
