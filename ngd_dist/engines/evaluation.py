"""Evaluations of a model beside its training: they draw random numbers and move buffers without leaving a trace."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import Tensor, nn

__all__ = ["random_state_kept", "standing_in"]


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """Gives torch's random state, on the CPU and on the model's devices, back as it was before the block."""
    devices = {p.device for p in model.parameters() if p.device.type != "cpu"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([]))
        for kind in {device.type for device in devices}:
            indices = [device.index for device in devices if device.type == kind]
            stack.enter_context(torch.random.fork_rng(indices, device_type=kind))
        yield


@contextmanager
def standing_in(model: nn.Module, replaced: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Puts these tensors in place of the parameters, and copies in place of the buffers, in all their modules."""
    in_place_of: dict[Tensor, Tensor] = {buffer: buffer.clone() for buffer in model.buffers()}
    in_place_of.update(replaced.items())
    modules = list(model.modules())
    registries = [cast(dict[str, Tensor | None], r) for m in modules for r in (m._parameters, m._buffers)]
    originals = [dict(registry) for registry in registries]
    try:
        for registry, original in zip(registries, originals, strict=True):
            registry.update(
                {name: in_place_of[x] for name, x in original.items() if x is not None and x in in_place_of}
            )
        yield
    finally:
        for registry, original in zip(registries, originals, strict=True):
            registry.clear()
            registry.update(original)
